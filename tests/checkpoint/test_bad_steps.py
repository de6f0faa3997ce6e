"""A step whose gradient is not finite changes only the counters and is not saved; too many end the run with 65."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bft_megatron.data.dataset import training_rows
from bft_megatron.hf.architectures import read_config
from bft_megatron.processes.terminal import output_to
from bft_megatron.recipe import reader
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.folder import RunFolder
from bft_megatron.run.prepared import RunRows, prepare_rows
from bft_megatron.run.resolved import Run
from bft_megatron.training import datasets, loop
from bft_megatron.upstream import training_loop
from tests.helpers.commands import run_command
from tests.helpers.runs import MODEL, RECIPE, read_metrics
from tests.helpers.world import run_world

STEPS, BATCH = 5, 4


def _overrides(tmp_path: Path, poisoned: set[int]) -> list[str]:
    """Of a run over twenty rows, once, with these poisoned."""
    lines = [json.loads(line) for line in (MODEL / "train.jsonl").read_text().splitlines()[: STEPS * BATCH]]
    marked = [json.dumps(line | {"weight": 100.0 if i in poisoned else 1.0}) for i, line in enumerate(lines)]
    (tmp_path / "data.jsonl").write_text("\n".join(marked) + "\n")
    return [
        *(f"model={MODEL}", f"data.train={tmp_path / 'data.jsonl'}", "data.valid=null", "data.packing=false"),
        *("objective.name=tests.checkpoint.fragile:record", "train.save_every=1", f"output={tmp_path / 'run'}"),
        *(f"train.iterations={STEPS}", f"train.global_batch_size={BATCH}", "train.lr=1e-3", "train.min_lr=0"),
        "train.warmup_iterations=0",
    ]


def _prepared(made: Recipe) -> RunRows:
    return prepare_rows(made, MODEL, read_config(MODEL).vocab_size)


def _rows_of(tmp_path: Path, *steps: int) -> set[int]:
    """The rows of these steps: of the same data without poison, in a run of its own."""
    made = reader.load(RECIPE, [*_overrides(tmp_path, set()), f"output={tmp_path / 'clean'}"])
    of = datasets.rows_of_step(Run(made, read_config(MODEL), MODEL, _prepared(made), 1))
    return {row for step in steps for row in of(step)}


def _train(made: Recipe, prepared: RunRows) -> list[bool]:
    """Train a rank -> for each step whether it changed the rank's parameters or its optimizer's state."""
    changed: list[bool] = []

    def watched(train_step: Callable[..., Any]) -> Callable[..., Any]:
        def step(forward: Any, data: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            before = _state(model, optimizer)
            result = train_step(forward, data, model, optimizer, *args, **kwargs)
            after = _state(model, optimizer)
            changed.append(len(before) != len(after) or not all(map(torch.equal, before, after)))
            return result

        return step

    training_loop.TRAIN_STEP.wrap(watched)
    with output_to(RunFolder.of(made).log(int(os.environ["RANK"]))) as console:
        loop.train(Run(made, read_config(MODEL), MODEL, prepared, int(os.environ["WORLD_SIZE"])), console)
    return changed


def _state(model: Any, optimizer: Any) -> list[torch.Tensor]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    states = [state for part in parts for state in part.optimizer.state.values()]
    held = [value for state in states for value in state.values() if torch.is_tensor(value)]
    return [t.detach().clone() for t in [*(p for chunk in model for p in chunk.parameters()), *held]]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_bad_sample_skips_its_step_on_every_rank_and_nothing_else(tmp_path: Path, precision: str):
    bad = 3
    (poisoned, *_) = _rows_of(tmp_path, bad)
    layout = ["parallel.tensor=2", "parallel.pipeline=2", f"train.precision={precision}", "train.keep_last=9"]
    made = reader.load(RECIPE, [*_overrides(tmp_path, {poisoned}), *layout])
    prepared, folder = _prepared(made), RunFolder.of(made)
    changed = run_world(4, _train, made, prepared, megatron=True)

    lines, _ = read_metrics(folder.metrics)
    assert [line.get("skipped", False) for line in lines] == [step == bad for step in range(1, STEPS + 1)]
    assert set(lines[bad - 1]["rows"]) == _rows_of(tmp_path, bad)
    assert changed == [[step != bad for step in range(1, STEPS + 1)]] * 4
    assert sorted(folder.iterations()) == [1, 2, 4, 5]
    assert (folder.root / "done").exists()
    # The schedule waits, the data do not.
    assert lines[bad - 2]["lr"] > lines[bad - 1]["lr"] == lines[bad]["lr"]
    assert lines[bad - 1]["loss"] is None  # metrics.jsonl is JSON, which has no NaN
    data = training_rows(prepared.train, seed=made.train.seed, limit=STEPS * BATCH)
    supervised = [sum(int((data[p]["labels"] >= 0).sum()) for p in range(s * BATCH, (s + 1) * BATCH)) for s in range(5)]
    assert [line["tokens"] for line in lines] == supervised


def test_too_many_in_a_row_end_with_65_and_leave_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    poisoned = _rows_of(tmp_path, 3, 4)
    words = [*_overrides(tmp_path, poisoned), "train.max_skipped=2", "train.keep_last=1"]
    assert run_command(monkeypatch, "train", RECIPE, *words) == 65
    lines = capfd.readouterr().out.splitlines()
    said = [line for line in lines if "skipped: " in line or "not saved" in line or "rank 0: BlownUp" in line]
    assert said[0].startswith("step     3/5  skipped: the gradient was not finite; rows ")
    assert said[1] == "step 3 is not saved: the gradient of the last step was not finite"
    assert len(said) == 4
    assert "rank 0: BlownUp: the gradient of 2 steps in a row was not finite" in said[3]
    assert "next start: from the checkpoint of step 2; " in said[3]
    folder = RunFolder(tmp_path / "run")
    assert sorted(folder.iterations()) == [1, 2]  # no step from 2 was finite, so that it does not cost 1
    assert f"to go back to step 1, remove {folder.checkpoint(2)}; command: bft-megatron train" in said[3]
    assert (folder.root / "unfinished").read_text().startswith("blown up: the gradient of 2 steps in a row was not")


@pytest.mark.parametrize(("valid", "status"), [(f"{MODEL / 'valid.jsonl'}", 0), ("null", 65)], ids=["vouches", "none"])
def test_a_validation_vouches_for_the_steps_before_a_bad_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], valid: str, status: int
):
    words = [*_overrides(tmp_path, _rows_of(tmp_path, STEPS)), "train.save_every=null", f"data.valid={valid}"]
    assert run_command(monkeypatch, "train", RECIPE, *words) == status
    how = "not saved" if status else "saved, for a validation of its parameters was finite"
    assert f"step {STEPS} is {how}: the gradient of the last step was not finite\n" in capfd.readouterr().out
    folder = RunFolder(tmp_path / "run")
    assert (folder.root / "done").exists() == (status == 0)
    assert folder.iterations() == ([STEPS] if status == 0 else [])


@pytest.mark.slow
def test_overlapped_communication_recovers_from_a_skipped_first_step(tmp_path: Path):
    """A validation comes before the first step that is not skipped, after which Megatron turns its hooks on."""
    poisoned, losses = _rows_of(tmp_path, 1), []
    validated = [f"data.valid={MODEL / 'valid.jsonl'}", "train.validate_every=1", "parallel.data=2"]
    for overlap in ("false", "true"):
        more = [f"megatron.overlap-{what}={overlap}" for what in ("grad-reduce", "param-gather")]
        words = [*_overrides(tmp_path, poisoned), *validated, *more, f"output={tmp_path / overlap}"]
        made = reader.load(RECIPE, words)
        run_world(2, _train, made, _prepared(made), megatron=True)
        train, valid = read_metrics(RunFolder.of(made).metrics)
        assert [line.get("skipped", False) for line in train] == [True, False, False, False, False]
        losses.append([line["lm_loss"] for line in train[1:] + valid])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
