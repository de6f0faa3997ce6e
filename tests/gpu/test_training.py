"""Training on one card against the same run on the CPU: every reported number, every gradient; and a resume."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from bft_megatron.run.folder import RunFolder
from tests.gpu.ranks import run_on_card
from tests.helpers.cases import OWN
from tests.helpers.comparing import differences
from tests.helpers.runs import MODEL, Case, Layout, Result, make_recipe, run, write_data

FP32 = 5e-5
"""Relative: a GPU adds in another order than a CPU."""
BF16 = 0.05
DEEP_BF16 = 0.1
"""Over thirty layers; bf16 on a CPU is 0.04 off its fp32 there, in a key's weight."""
SMOLLM2 = {
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
TORCHS_RULE = pytest.mark.skipif(
    importlib.util.find_spec("fla") is not None, reason="flash-linear-attention multiplies fp32 in TF32"
)
ENGINE = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)
TORCH, TE = "layers=torch", "layers=transformer_engine"
TRITON = ("objective.head=chunked", "objective.kernels=triton")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def worst(result: Result, expected: Result) -> tuple[str, float]:
    assert result.gradients.keys() == expected.gradients.keys()
    found = differences(result, expected)
    name = max(found, key=lambda name: found[name])
    return name, found[name]


@pytest.mark.parametrize(
    ("case", "rows", "overrides"),
    [
        pytest.param(Case(), 1, (), id="packed"),
        pytest.param(Case(packing=False), 2, (), id="padded"),
        pytest.param(Case("sft"), 1, TRITON, id="sft-chunked-triton"),
        pytest.param(Case(OWN), 1, ("objective.kernels=triton",), id="own-triton"),
        pytest.param(Case(model="qwen3"), 1, (), id="qwen3"),
        pytest.param(Case(model="mistral"), 1, (), id="mistral"),
        pytest.param(Case(model="qwen3_moe"), 1, (), id="qwen3_moe"),
        pytest.param(Case(model="hunyuan"), 1, (), id="hunyuan"),
        pytest.param(Case(model="hybrid"), 1, (), id="hybrid", marks=TORCHS_RULE),
        pytest.param(Case(model="hybrid", packing=False), 2, (), id="hybrid-padded", marks=TORCHS_RULE),
        pytest.param(Case(model="hybrid_moe"), 1, (), id="hybrid_moe", marks=TORCHS_RULE),
    ],
)
def test_fp32_is_the_cpus(case: Case, rows: int, overrides: tuple[str, ...], data: Path, tmp_path: Path):
    layout = Layout(micro_batch_size=rows)
    plain = [field for field in overrides if "triton" not in field]
    expected = run(make_recipe(tmp_path / "cpu", data, case, layout, 2, "device=cpu", *plain), 1)
    name, difference = worst(
        run_on_card(make_recipe(tmp_path / "gpu", data, case, layout, 2, TORCH, *overrides)), expected
    )
    assert difference < FP32, name


@pytest.mark.parametrize(
    ("case", "overrides"),
    [
        (Case(), (TORCH,)),
        (Case(model="mistral"), (TORCH, *TRITON)),
        (Case(model="hybrid"), (TORCH,)),
        *(
            pytest.param(case, (TE,), marks=ENGINE)
            for case in (
                Case(),
                Case(packing=False),
                Case(model="qwen3"),
                Case(model="qwen3_moe"),
                Case(model="hybrid"),
            )
        ),
    ],
)
def test_bf16_is_near_it(case: Case, overrides: tuple[str, ...], data: Path, tmp_path: Path):
    expected = run(make_recipe(tmp_path / "cpu", data, case, Layout(), 2, "device=cpu"), 1)
    made = make_recipe(tmp_path / "gpu", data, case, Layout(), 2, "train.precision=bf16", *overrides)
    found = run_on_card(made)
    for mine, cpus in zip(found.train + found.valid, expected.train + expected.valid, strict=True):
        for name in ("loss", "lm_loss", "mean_p", "mean_confidence", "min_confidence"):
            assert mine[name] == pytest.approx(cpus[name], rel=BF16), name
    for name, gradient in expected.gradients.items():
        distance = (found.gradients[name] - gradient).norm() / gradient.norm()
        assert distance < BF16, name


@pytest.fixture(scope="module")
def smollm2(data: Path) -> str:
    """A model folder of SmolLM2-135M's sizes, its weights drawn at random."""
    folder = data / "smollm2"
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | SMOLLM2))
    return folder.name


def test_a_step_of_smollm2s_size_is_near_the_cpus(smollm2: str, data: Path, tmp_path: Path):
    case, fields = Case(model=smollm2), ("train.global_batch_size=2",)
    expected = run(make_recipe(tmp_path / "cpu", data, case, Layout(), 1, "device=cpu", *fields), 1)
    found = run_on_card(make_recipe(tmp_path / "gpu", data, case, Layout(), 1, "train.precision=bf16", *fields))
    assert found.train[0]["lm_loss"] == pytest.approx(expected.train[0]["lm_loss"], rel=BF16)
    far = {
        name: float((found.gradients[name] - gradient).norm() / gradient.norm())
        for name, gradient in expected.gradients.items()
    }
    assert max(far.values()) < DEEP_BF16, max(far, key=lambda name: far[name])


def test_a_resumed_run_takes_the_same_step_again(data: Path, tmp_path: Path):
    made = make_recipe(tmp_path / "run", data, Case(), Layout(), 4, "train.precision=bf16", "train.keep_last=9")
    whole, folder = run_on_card(made), RunFolder.of(made)
    shutil.rmtree(folder.checkpoint(4))
    folder.write_tracker(3)
    again = run_on_card(made)
    assert [line["iteration"] for line in again.train] == [1, 2, 3, 4]
    name, difference = worst(again, whole)
    assert difference < 1e-3, name
