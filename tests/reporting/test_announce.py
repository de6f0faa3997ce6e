"""What a run says ahead of its first step on samples without a confidence window, and what its steps report of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bft_megatron.hf.architectures import read_config
from bft_megatron.recipe import reader
from bft_megatron.reporting.announce import notes, sentence
from bft_megatron.run.prepared import prepare_rows
from bft_megatron.run.resolved import Run
from tests.helpers.commands import run_command
from tests.helpers.runs import MODEL, RECIPE, read_metrics
from tests.helpers.world import run_world

OVERRIDES = [
    *(f"model={MODEL}", f"data.train={MODEL / 'train.jsonl'}", f"data.valid={MODEL / 'valid.jsonl'}"),
    *("parallel.context=2", "data.pad_multiple=4", "objective.group_size=20"),
]


def test_a_run_says_how_many_samples_have_no_window_and_its_steps_report_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    one_step_of_all_rows = ["train.iterations=1", "train.warmup_iterations=0", "train.global_batch_size=14"]
    words = [*OVERRIDES, *one_step_of_all_rows, f"output={tmp_path}"]
    assert run_command(monkeypatch, "train", RECIPE, *words) == 0
    said = capfd.readouterr().out
    lost = re.search(r"^(\d+) of 40 samples have a window of 20 supervised tokens only across", said, re.MULTILINE)
    short = re.search(r"^(\d+) of 40 samples have fewer than 20 supervised tokens: .* mean over", said, re.MULTILINE)
    (step,), _ = read_metrics(tmp_path / "metrics.jsonl")
    assert step["samples"] == 40
    assert step["without_window"] == (int(lost[1]) + int(short[1])) / 40
    assert "objective.cp_windows=exact sees them" in said


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["objective.cp_windows=exact"], ["14 of 40 samples have fewer than 20"]),
        (["objective.group_size=1"], []),
        (["objective.name=sft"], []),
    ],
    ids=["exact", "windows of one token", "sft"],
)
def test_nothing_is_said_of_windows_that_are_there(tmp_path: Path, overrides: list[str], expected: list[str]) -> None:
    made = reader.load(RECIPE, [*OVERRIDES, *overrides, f"output={tmp_path}"])
    run = Run(made, read_config(MODEL), MODEL, prepare_rows(made, MODEL, 500), 2)
    found = notes(run)
    assert [note[: len(text)] for note, text in zip(found, expected, strict=True)] == expected


@pytest.mark.parametrize("rows", [8, 2_000_000_000])
def test_a_step_of_days_is_said(tmp_path: Path, rows: int) -> None:
    made = reader.load(RECIPE, [*OVERRIDES, f"train.global_batch_size={rows}", f"output={tmp_path}"])
    run = Run(made, read_config(MODEL), MODEL, prepare_rows(made, MODEL, 500), 2)
    (said,) = run_world(1, sentence, run, 0, megatron=True)
    assert said.endswith("days: is train.global_batch_size meant?") == (rows > 8)
