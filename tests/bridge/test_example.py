"""The example for Llama 3.1 8B as far as it goes without the model, which is behind a licence, and without GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
from megatron.bridge import AutoBridge
from megatron.bridge.training.utils.train_utils import needs_global_state_injection

from tests.helpers.runs import MODEL


def test_example_configures_bridges_own_recipe(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "bridge")
    import finetune_llama31_8b as example

    tiny = AutoBridge.from_hf_pretrained(MODEL)
    monkeypatch.setattr(AutoBridge, "from_hf_pretrained", lambda *_, **__: tiny)
    config = example.configure("llama")
    assert config.checkpoint.pretrained_checkpoint == "llama"
    assert config.model.calculate_per_token_loss
    assert not config.ddp.average_in_collective
    assert config.dataset.enable_offline_packing
    assert config.train.micro_batch_size == 1
    assert needs_global_state_injection(example.forward_step())
