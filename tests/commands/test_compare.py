"""`bft-megatron check`: green on any layout of any architecture; red, by name, where a layer is not the model's."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from bft_megatron.hf import load
from bft_megatron.hf.tensors import Weight
from tests.helpers import tiny_models
from tests.helpers.commands import run_command
from tests.helpers.runs import MODEL


def check(
    data: Path, out: Path, patch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str]:
    """-> (status, what it said)."""
    status = run_command(
        patch, "check", "recipes/tiny.yaml", f"data.train={data / 'train.jsonl'}", "device=cpu", f"output={out}", *words
    )
    assert not (out / "check.safetensors").exists()
    return status, capfd.readouterr().out


LAYOUTS = {
    "tp2-pp2": ["parallel.tensor=2", "parallel.pipeline=2", "objective.head=chunked"],
    "vpp2-padded": ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "data.packing=false", "objective.name=dft"],
    "cp2-dp2": ["parallel.context=2", "parallel.data=2", "objective.reduce=tokens"],
    "padded-mb2-tp2": ["parallel.tensor=2", "data.packing=false", "train.micro_batch_size=2", "objective.name=sft"],
    "tp2-ep2-etp2-dp2": ["parallel.tensor=2", "parallel.data=2", "parallel.expert=2", "parallel.expert_tensor=2"],
    "vpp2-ep2": ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.data=2", "parallel.expert=2"],
    "cp2-padded": ["parallel.context=2", "data.packing=false", "train.micro_batch_size=2"],
}
MODELS = [
    ("tiny", "tp2-pp2"),
    ("qwen2", "vpp2-padded"),
    ("qwen3", "cp2-dp2"),
    ("mistral", "padded-mb2-tp2"),
    ("qwen3_moe", "tp2-ep2-etp2-dp2"),
    ("glm", "vpp2-ep2"),
    *(pytest.param(name, "cp2-padded", marks=pytest.mark.slow) for name in ("qwen3_moe_dense", "qwen2_moe", "mixtral")),
    pytest.param("hunyuan", "vpp2-padded", marks=pytest.mark.slow),
    pytest.param("hybrid", "tp2-pp2", marks=pytest.mark.slow),
    pytest.param("hybrid_moe", "vpp2-ep2", marks=pytest.mark.slow),
    pytest.param("next", "tp2-ep2-etp2-dp2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("model", "layout"), MODELS)
def test_green(
    layout: str,
    model: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    folder = MODEL if model == "tiny" else data / model
    status, said = check(data, tmp_path, monkeypatch, capfd, f"model={folder}", *LAYOUTS[layout])
    assert status == 0
    assert said.splitlines()[-1] == "green"
    losses = re.findall(r"loss +│ +([\d.e-]+) +│ +([\d.e-]+)", said)
    assert len(losses) == 2
    for transformers, here in losses:
        assert float(here) == pytest.approx(float(transformers), rel=1e-5)


@pytest.fixture(scope="module")
def with_vision(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a small model -> its folder, with a tokenizer."""

    @cache
    def made(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name) / "model"
        tiny_models.save(name, folder, vocab_size=500)
        for file in MODEL.glob("tokenizer*.json"):
            shutil.copy(file, folder)
        return folder

    return made


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hybrid_moe_vl", ["parallel.tensor=2", "parallel.expert=2"]),
        pytest.param("hybrid_vl", ["parallel.context=2"], marks=pytest.mark.slow),
        pytest.param("hybrid_vl", ["train.precision=bf16", "parallel.pipeline=2"], marks=pytest.mark.slow),
        pytest.param("hybrid_moe_vl", ["train.precision=bf16"], marks=pytest.mark.slow),
    ],
)
def test_beside_a_vision_part(
    name: str,
    words: list[str],
    with_vision: Callable[[str], Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    status, said = check(data, tmp_path, monkeypatch, capfd, f"model={with_vision(name)}", "init=pretrained", *words)
    assert status == 0
    assert said.splitlines()[-1] == "green"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hybrid", "hybrid_moe", "next"])
def test_hybrids_in_bf16(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    words = [f"model={data / name}", "train.precision=bf16", "parallel.tensor=2", "parallel.sequence=true"]
    assert check(data, tmp_path, monkeypatch, capfd, *words)[0] == 0


def test_bf16_is_held_to_what_bf16_does_to_transformers(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    status, said = check(data, tmp_path, monkeypatch, capfd, "train.precision=bf16", "parallel.tensor=2")
    assert status == 0
    assert "bf16, TP 2" in said


def test_a_mixture_in_bf16_is_compared_under_the_routing_of_transformers(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    words = [f"model={data / 'qwen3_moe'}", "train.precision=bf16", "parallel.context=2", "parallel.expert=2"]
    status, said = check(data, tmp_path, monkeypatch, capfd, *words)
    assert status == 0
    here, allowed = re.findall(r"tokens rerouted .+?([\d.]+)% +│ +([\d.]+)%", said)[0]
    assert 0 < float(here) <= float(allowed) < 10


def test_red_names_the_layer_whose_router_chooses_other_experts(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    fill = load.fill_part

    def fill_wrongly(parameter: torch.nn.Parameter, weight: Weight, source: Any) -> None:
        fill(parameter, weight, source)
        if weight.path == "decoder.layers.2.mlp.router.expert_bias":
            parameter[3] += 1  # it is added for the choice alone, which then no output shows

    monkeypatch.setattr(load, "fill_part", fill_wrongly)
    status, said = check(data, tmp_path, monkeypatch, capfd, f"model={data / 'glm'}", "train.precision=bf16")
    assert status == 1
    assert said.splitlines()[-1] == "red: the first whose router chooses other experts than transformers is layer 3"


@pytest.mark.parametrize(
    ("broken", "name", "words"),
    [
        ("decoder.layers.2.mlp.linear_fc2.weight", "layer 3", ["parallel.tensor=2", "parallel.pipeline=2"]),
        ("decoder.final_layernorm.weight", "final norm", ["parallel.context=2"]),
    ],
)
def test_red_names_the_first_layer_that_differs(
    broken: str,
    name: str,
    words: list[str],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    fill = load.fill_part

    def fill_wrongly(parameter: torch.nn.Parameter, weight: Weight, source: Any) -> None:
        fill(parameter, weight, source)
        if weight.path == broken:
            parameter *= 1.01

    monkeypatch.setattr(load, "fill_part", fill_wrongly)
    status, said = check(data, tmp_path, monkeypatch, capfd, *words)
    assert status == 1
    assert said.splitlines()[-1] == f"red: the first that differs from transformers is the {name}"
