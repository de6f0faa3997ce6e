"""Stock Megatron-LM loads a mixture that a conversion wrote, on another layout, and computes what transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.checkpointing import load_checkpoint
from megatron.training.initialize import initialize_megatron
from megatron.training.models.gpt import GPTModelBuilder, default_layer_spec

from bft_megatron.training.initialize import CPU_FLAGS
from bft_megatron.upstream import command_line
from tests.helpers import sharded, tiny_models
from tests.helpers.commands import run_command
from tests.helpers.tiny_models import SavedModel
from tests.helpers.world import run_world

RECIPE = """\
model: {model}
data: {{train: none.jsonl, seq_length: 24}}
train: {{iterations: 5, precision: fp32}}
device: cpu
parallel: {{tensor: 2, expert: 2}}
output: {out}
"""

FLAGS = {
    "qwen2_moe": ["--norm-epsilon", "1e-6", "--moe-shared-expert-gate"],
    "qwen3_moe": ["--norm-epsilon", "1e-6", "--qk-layernorm"],
    "mixtral": ["--norm-epsilon", "1e-5", "--window-size", "6,0"],
    "glm": ["--norm-epsilon", "1e-5", "--qk-layernorm", "--moe-router-num-groups", "4", "--moe-router-group-topk", "2"],
}
"""What Megatron does not take from a checkpoint."""


def _spec(config: Any, vp_stage: int | None = None) -> Any:
    """Megatron's own layers for a CPU, whose norm before the router is stored under Transformer Engine's name."""
    block = default_layer_spec(config, vp_stage)
    for layer in block.layer_specs:
        if layer.submodules.mlp.func is MoELayer:
            layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return block


def _logits(checkpoints: Path, flags: list[str]) -> torch.Tensor | None:
    words = ["--load", str(checkpoints), "--use-checkpoint-args", "--no-load-optim", "--no-load-rng", *flags]
    args = command_line.parse([*words, *sharded.RUN_FLAGS, *CPU_FLAGS])
    initialize_megatron()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    gpt = gpt_config_from_args(args)
    gpt.transformer_layer_spec = _spec
    chunks = GPTModelBuilder(gpt).build_distributed_models(groups, wrap_with_ddp=False)
    load_checkpoint(chunks, None, None)
    return sharded.logits([chunk.eval() for chunk in chunks])


@pytest.mark.parametrize("name", [n if n == "glm" else pytest.param(n, marks=pytest.mark.slow) for n in FLAGS])
def test_stock_megatron_loads_it(
    name: str, mixtures: list[SavedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [model] = [m for m in mixtures if m.name == name]
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(RECIPE.format(model=model.folder, out=out))
    assert run_command(monkeypatch, "convert", recipe) == 0
    flags = [*FLAGS[name], "--vocab-size", str(tiny_models.VOCABULARY), "--pipeline-model-parallel-size", "2"]
    outputs = run_world(2, _logits, out / "checkpoints", flags, megatron=True)
    prompt = tiny_models.prompts()[1].bool()
    error = (outputs[1][..., : tiny_models.VOCABULARY] - model.logits)[prompt].abs().max()
    assert error < 1e-5 * model.logits.abs().max()
