"""What is legal and unlikely is said by the command that prepares the data; what is usual is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT, run_command

RECIPE = """\
model: {tiny}
init: random
data:
  train: {folder}/rows.jsonl
  seq_length: 128
train:
  iterations: 2
output: {folder}/out
"""


def prepared(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    weights: list[float],
    *overrides: str,
) -> list[str]:
    """The warnings of `prepare` for rows with these weights."""
    lines = (ROOT / "recipes/tiny/train.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"weight": weight} for line, weight in zip(lines, weights, strict=False)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE.format(tiny=ROOT / "recipes/tiny", folder=folder))
    assert run_command(monkeypatch, "prepare", folder / "recipe.yaml", *overrides) == 0
    out = capfd.readouterr().out
    return [line for line in out.splitlines() if line.startswith("warning: ")]


def test_weights_that_are_all_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    [said] = prepared(tmp_path, monkeypatch, capfd, [0, 0, 0])
    assert said == "warning: data.train: every conversation's `weight` is 0, so nothing is learned"


def test_a_batch_of_a_thousand_data_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    [said] = prepared(tmp_path, monkeypatch, capfd, [0, 1, 0], "train.global_batch_size=1000000000")
    assert said.startswith("warning: train.global_batch_size: a step reads 1,000,000,000 rows, ")


def test_usual_data_are_prepared_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    assert prepared(tmp_path, monkeypatch, capfd, [0, 0.5, 1], "train.global_batch_size=100") == []
