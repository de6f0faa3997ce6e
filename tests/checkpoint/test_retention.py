"""Which checkpoints stay: the last few, the best few, never a broken one in place of a good one."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from bft_megatron.checkpoint.retention import Retention
from bft_megatron.run.folder import RunFolder
from tests.helpers.background import arguments
from tests.helpers.commands import command, run_command

WHOLE = [2, 4, 6, 8, 10]
SCORES = {2: 0.1, 4: 0.9, 6: 0.5, 10: 0.2}


@pytest.mark.parametrize(
    ("last", "best", "metric", "kept"),
    [
        (1, 0, "mean_p", {10}),
        (2, 0, "mean_p", {8, 10}),
        (1, 1, "mean_p", {4, 10}),
        (1, 2, "accuracy", {4, 6, 10}),
        (1, 1, "lm_loss", {2, 10}),
        (2, 2, "loss", {2, 8, 10}),
        (9, 9, "mean_p", {2, 4, 6, 8, 10}),
    ],
)
def test_the_last_and_the_best_stay(last: int, best: int, metric: str, kept: set[int]):
    assert Retention(last, best, metric).kept(WHOLE, SCORES) == kept


def test_of_equals_the_newer_is_the_better_one():
    assert Retention(1, 1, "mean_p").kept([2, 4, 6], dict.fromkeys([2, 4, 6], 0.5)) == {6}
    assert Retention(1, 2, "mean_p").kept([2, 4, 6], dict.fromkeys([2, 4, 6], 0.5)) == {4, 6}


@pytest.fixture
def folder(undisturbed: Path, tmp_path: Path) -> RunFolder:
    """A copy with checkpoints 2, 4, 6, and a validation at each, the best first."""
    shutil.copytree(undisturbed, tmp_path / "run")
    made = RunFolder(tmp_path / "run")
    _write_scores(made, {2: 1 / 2, 4: 1 / 4, 6: 1 / 6})
    return made


def _write_scores(folder: RunFolder, mean_p: dict[int, float | None]) -> None:
    lines = [{"iteration": i, "split": "valid", "mean_p": p, "lm_loss": i} for i, p in mean_p.items()]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _wait_for_deletion(folder: RunFolder) -> None:
    deadline = time.monotonic() + 10
    while list(folder.checkpoints.glob("deleted_*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_score_that_is_no_number_is_none(folder: RunFolder):
    _write_scores(folder, {2: 0.1, 4: None, 6: 0.2})
    assert Retention(1, 2, "mean_p").apply(folder) == [4]


def test_deletes_what_need_not_be_kept_and_what_an_earlier_process_left_half_deleted(folder: RunFolder):
    shutil.copytree(folder.checkpoint(2), folder.checkpoints / "deleted_iter_0000001")
    assert Retention(1, 1, "mean_p").apply(folder) == [4]
    _wait_for_deletion(folder)
    assert sorted(path.name for path in folder.checkpoints.iterdir() if path.is_dir()) == [
        "iter_0000002",
        "iter_0000006",
    ]


@pytest.mark.parametrize("harm", ["cut", "unfinished"])
def test_a_newer_one_that_is_not_whole_costs_no_good_one(folder: RunFolder, harm: str):
    newest = folder.checkpoint(6)
    if harm == "cut":
        (newest / "__0_0.distcp").write_bytes(b"")
    else:
        (newest / "metadata.json").unlink()
    assert Retention(1, 0, "mean_p").apply(folder) == [2]
    assert sorted(folder.iterations()) == [4, 6]
    assert Retention(1, 0, "mean_p").apply(folder) == []  # 4 is the only good one


def test_a_run_keeps_its_best_by_validation_and_its_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The learning rate is so high that the first steps are the best."""
    out = tmp_path / "run"
    saves = ["parallel.tensor=1", "train.save_every=1", "train.validate_every=1", "train.keep_last=1"]
    words = arguments(out, *saves, "train.keep_best=1", "train.best_metric=lm_loss", "train.lr=1")
    assert run_command(monkeypatch, *words) == 0
    folder = RunFolder(out)
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    losses = {line["iteration"]: line["lm_loss"] for line in lines if "split" in line and line["iteration"]}
    best = min(losses, key=lambda i: losses[i])
    assert best != max(losses)
    assert sorted(folder.iterations()) == [best, max(losses)]


def test_keep_best_needs_a_validation_at_every_save(tmp_path: Path):
    words = ["recipes/tiny.yaml", f"output={tmp_path}", "train.keep_best=1", "train.save_every=3"]
    done = command("train", *words, "train.validate_every=2")
    assert done.returncode == 2
    assert "train.keep_best=1: a checkpoint is judged by the validation at its step" in " ".join(done.stderr.split())
