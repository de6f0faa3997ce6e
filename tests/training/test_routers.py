"""Routers of a run: frozen, with padding kept out of them, and what is said of experts without tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from bft_megatron.reporting import expert_load
from bft_megatron.run.folder import RunFolder
from bft_megatron.training.routers import spread
from tests.helpers import model_reference as reference
from tests.helpers.checkpoints import assert_same_tensors, tensors
from tests.helpers.comparing import assert_same
from tests.helpers.router_reference import Routers
from tests.helpers.runs import Case, Layout, Result, make_recipe, run

CASE = Case("bft", model="qwen3_moe")


def _freeze(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("mlp.gate.weight"))
    return model


@pytest.mark.slow
def test_frozen_routers_keep_their_bits_and_have_no_state_before_and_after_a_resume(data: Path, tmp_path: Path):
    """Two steps, balanced, on two expert-parallel ranks; ended after the first, they end with the same bits."""
    frozen = ("moe.freeze_router=true", "moe.balance=0.02")
    made = make_recipe(tmp_path / "run", data, CASE, Layout(data=2, expert=2), 2, *frozen)
    result, folder = run(made, 2), RunFolder.of(made)
    assert_same(result, reference.first_step(made, adapt=lambda model: Routers(made).add_gradients(_freeze(model))))
    stored = tensors(folder.checkpoint(2))
    assert [name for name in stored if name.startswith("optimizer") and "router" in name] == []
    drawn = reference.whole_model(made).state_dict()
    for layer, weight in enumerate(stored["decoder.layers.mlp.router.weight"]):
        assert torch.equal(weight, drawn[f"model.layers.{layer}.mlp.gate.weight"].float())
    shutil.copytree(folder.root, tmp_path / "whole")
    shutil.rmtree(folder.checkpoint(2))
    (folder.root / "done").unlink()
    assert run(made, 2).train == result.train
    assert_same_tensors(folder.checkpoint(2), RunFolder(tmp_path / "whole").checkpoint(2))


def _one_step_is_enough() -> None:
    expert_load.DEAD_AFTER = 0.1


def test_experts_without_tokens_are_named(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """More experts than a row has tokens for, on two stages."""
    model = shutil.copytree(data / "qwen3_moe", tmp_path / "many")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_experts": 32}))
    case = Case("sft", packing=False)
    one_row = (f"model={model}", "train.iterations=null", "train.epochs=0.02")
    made = make_recipe(tmp_path / "run", data, case, Layout(pipeline=2), 0, *one_row)
    result, routers = run(made, 2, before=_one_step_is_enough), Routers(made)
    routers.add_gradients(reference.whole_model(made))
    assert routers.loads is not None
    idle = [", ".join(str(i) for i, tokens in enumerate(load) if not tokens) for load in routers.loads.tolist()]
    assert all(idle)
    named = "; ".join(f"layer {layer}: {experts}" for layer, experts in zip(routers.layers, idle, strict=True))
    said = capfd.readouterr().out
    assert said.count("experts that received no token") == 1
    assert f"of their layer: {named}\n" in said
    assert result.train[0]["expert_load"] == pytest.approx(routers.report()["expert_load"])


def test_a_dense_model_reports_no_experts(one_process: Callable[[Case], Result]):
    assert [key for key in one_process(Case()).train[0] if "expert" in key] == []


def test_padding_goes_to_all_experts_in_turn_and_weighs_nothing():
    padding = torch.tensor([False, True, False, True, True, True])
    probs = torch.rand(6, 4).requires_grad_()
    chosen = probs > 0.5
    weights, experts = spread(probs, chosen, padding, 2)
    assert torch.equal(weights, probs * ~padding[:, None])
    assert torch.equal(experts[~padding], chosen[~padding])
    assert experts[padding].int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]] * 2
