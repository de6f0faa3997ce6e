"""`bft-megatron score`: on any layout every sample's numbers are those of transformers in float64, one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bft_megatron.data.dataset import validation_rows
from bft_megatron.hf.architectures import read_config
from bft_megatron.recipe import reader
from bft_megatron.run.prepared import prepare_rows
from tests.helpers import model_reference as reference
from tests.helpers.commands import run_command
from tests.helpers.runs import MODEL, Case, Layout, make_recipe

LAYOUTS = {
    "packed": (Layout(tensor=2, pipeline=2, data=2, sequence=True), Case()),
    "exact-windows": (Layout(context=2, data=2), Case()),
    "per-rank-windows": (Layout(tensor=2, context=2), Case(cp_windows="per_rank", confidence="arithmetic")),
    "padded": (Layout(pipeline=2, virtual_pipeline=2, micro_batch_size=2), Case(objective="dft", packing=False)),
}

WEIGHTS = {"train": 2, "valid": 0.5, "train_short": 3}


def write_recipe(case: Case, layout: Layout, data: Path, out: Path) -> Path:
    """The file of a case on a layout."""
    made = make_recipe(out, data, case, layout, 1, "device=cpu", "train.global_batch_size=8")
    recipe = out.parent / "recipe.yaml"
    recipe.write_text(reader.dump(made))
    return recipe


def read_scores(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("name", LAYOUTS)
def test_scores(name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    layout, case = LAYOUTS[name]
    out = tmp_path / "run"
    assert run_command(monkeypatch, "score", write_recipe(case, layout, data, out), "--data", "valid") == 0
    found = read_scores(out / "scores_valid.jsonl")
    made = make_recipe(out, data, case, layout, 1)
    prepared = prepare_rows(made, MODEL, read_config(MODEL).vocab_size).valid
    rows = validation_rows(prepared, batch=1)
    windows_cp = layout.context if case.cp_windows == "per_rank" else 1
    expected = reference.measure(made, reference.whole_model(made), [rows[i] for i in range(prepared.rows)], windows_cp)
    assert len(found) == len(expected) == prepared.counts.samples
    for score, sample in zip(found, expected, strict=True):
        n = sample.tokens
        assert score["source"] == ("long", "short")[sample.source]
        assert score["tokens"] == n
        numbers = [score[name] for name in ("lm_loss", "mean_p", "accuracy", "confidence", "weight")]
        wanted = [sample.nll / n, sample.p / n, sample.correct / n, sample.confidence, sample.weight]
        assert numbers == pytest.approx(wanted, rel=1e-5, abs=1e-9)
    assert {score["where"] for score in found} == {
        f"{data / name}.jsonl:{line + 1}"
        for name in ("valid", "valid_short")
        for line in range(len((data / f"{name}.jsonl").read_text().splitlines()))
    }


def test_a_sources_weight_does_not_count(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = write_recipe(Case(packing=False), Layout(data=2), data, tmp_path / "run")
    sources = [f"{{path: {data / name}.jsonl, name: {name}, weight: {w}}}" for name, w in WEIGHTS.items()]
    assert run_command(monkeypatch, "score", recipe, f"data.train=[{', '.join(sources)}]") == 0
    found = [score["where"] for score in read_scores(tmp_path / "run" / "scores.jsonl")]
    lines = {name: len((data / f"{name}.jsonl").read_text().splitlines()) for name in WEIGHTS}
    assert found == [f"{data / name}.jsonl:{line + 1}" for name, n in lines.items() for line in range(n)]


def test_before_and_after_training(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On another layout than the run's; its validations have the same means."""
    out = tmp_path / "run"
    recipe = write_recipe(Case(), Layout(), data, out)
    assert run_command(monkeypatch, "train", recipe, "train.lr=0.01") == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    wanted = [line["mean_confidence"] for line in lines if line.get("split") == "valid"]  # before and after the step
    options = ("train.lr=0.01", "parallel.tensor=2", "--data", "valid")
    for trained in ((), ("--trained",)):
        assert run_command(monkeypatch, "score", recipe, *options, *trained) == 0
    means = []
    for name in ("scores_valid", "scores_valid_trained"):
        found = [score["confidence"] for score in read_scores(out / f"{name}.jsonl")]
        means.append(sum(found) / len(found))
    assert means == pytest.approx(wanted, rel=1e-5)
    assert means[0] != pytest.approx(means[1], rel=1e-2)


def test_what_cannot_be_scored(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = write_recipe(Case(), Layout(), data, tmp_path / "run")
    assert run_command(monkeypatch, "score", recipe, "--trained") == 2
    assert run_command(monkeypatch, "score", recipe, "data.valid=null", "--data", "valid") == 2
    assert run_command(monkeypatch, "score", recipe, "--out", data / "valid.jsonl" / "scores.jsonl") == 2
    assert not list((tmp_path / "run").glob("scores*"))
