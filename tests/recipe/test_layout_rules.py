"""Layouts that a mixture of experts cannot have, refused before any process starts, with the field to change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT, run_command
from tests.helpers.runs import VARIANTS

EXPERTS = "recipes/tiny_moe"
REFUSED = {
    "experts-by-expert": (
        ["parallel.data=3", "parallel.expert=3"],
        "parallel.expert",
        "3 does not divide the model's 8",
    ),
    "columns-by-expert-tensor": (
        ["parallel.data=3", "parallel.expert_tensor=3"],
        "parallel.expert_tensor",
        "3 does not divide the 32 feed-forward columns of an expert",
    ),
    "tensor-without-sequence": (
        ["parallel.tensor=2", "parallel.sequence=false"],
        "parallel.sequence",
        "a model with experts and parallel.tensor above 1 needs it: leave it out",
    ),
    "processes": (
        ["parallel.data=2", "parallel.expert=4"],
        "parallel.expert",
        "expert x expert_tensor x pipeline = 4 processes hold the experts once; 2 is not a multiple",
    ),
    "processes-of-a-stage": (
        ["parallel.pipeline=2", "parallel.data=2", "parallel.expert=2", "parallel.expert_tensor=2"],
        "parallel.expert",
        "= 8 processes hold the experts once; 4 is not a multiple",
    ),
    "no-process": (["parallel.expert=0"], "parallel.expert", "must be at least 1"),
    "optimizer-instances": (
        ["parallel.data=2", "parallel.expert=2", "megatron.num-distributed-optimizer-instances=2"],
        "megatron.num-distributed-optimizer-instances",
        "2 does not divide the 1 processes that share an expert",
    ),
    "fused-router": (
        ["megatron.moe-router-fusion=true"],
        "megatron.moe-router-fusion",
        "is for GPUs, and device is cpu",
    ),
    "flex-dispatcher": (
        ["parallel.data=2", "parallel.expert=2", "megatron.moe-token-dispatcher-type=flex"],
        "megatron.moe-token-dispatcher-type",
        "is for GPUs, and device is cpu",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_layout_that_the_experts_cannot_have_is_refused(case: str, refused: Callable[..., str]):
    words, field, why = REFUSED[case]
    said = refused(f"model={ROOT / EXPERTS}", "device=cpu", *words)
    assert field in said
    assert why in said


DENSE = {
    "parallel.expert=2": "parallel.expert",
    "parallel.expert_tensor=2": "parallel.expert_tensor",
    "megatron.moe-permute-fusion=true": "megatron.moe-permute-fusion",
}


@pytest.mark.parametrize("word", DENSE)
def test_a_dense_model_has_no_experts_to_lay_out(word: str, refused: Callable[..., str]):
    said = refused("parallel.data=2", word)
    assert DENSE[word] in said
    assert "the model has no experts: leave it out" in said


def test_shared_experts_are_divided_as_other_layers_are(refused: Callable[..., str], tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(ROOT / "recipes/tiny", model)
    sizes = VARIANTS["qwen2_moe"] | {"shared_expert_intermediate_size": 49}
    config = json.loads((model / "config.json").read_text()) | sizes
    (model / "config.json").write_text(json.dumps(config))
    said = refused(f"model={model}", "parallel.tensor=2")
    assert "2 does not divide the model's 49 feed-forward columns of shared experts" in said


def test_preflight_and_plan_refuse_it_too(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
):
    words = ["recipes/tiny_moe.yaml", f"output={tmp_path / 'run'}", "parallel.expert=3"]
    for command in (["preflight", *words, "parallel.data=3"], ["plan", *words, "--nodes=1", "--gpus-per-node=3"]):
        assert run_command(monkeypatch, *command) == 2
        assert "3 does not divide the model's 8 experts" in capfd.readouterr().err
