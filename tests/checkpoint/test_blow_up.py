"""A run that blows up keeps its last good checkpoint and ends with 65, however often it is started."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from bft_megatron.checkpoint.gate import Gate, finite
from bft_megatron.checkpoint.streak import ADVICE, Streak
from bft_megatron.errors import BlownUp
from bft_megatron.reporting.totals import SUMS, Totals
from bft_megatron.run.folder import RunFolder
from bft_megatron.upstream.training_loop import StepEnd
from tests.helpers.commands import run_command
from tests.helpers.runs import MODEL, RECIPE
from tests.helpers.world import run_world

FRAGILE = "objective.name=tests.checkpoint.fragile:record"
AT_ONCE = "train.exit_after=0.0001"
"""Stops after the first step of each start."""


class Started:
    """A run of the tiny recipe in a folder, started as often as a test asks."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder, self.monkeypatch, self.capfd = RunFolder(root), monkeypatch, capfd
        self.said: list[str] = []

    def start(self, *words: str) -> int:
        fixed = ("device=cpu", "train.save_every=1", f"output={self.folder.root}")
        status = run_command(self.monkeypatch, "train", RECIPE, *fixed, *words)
        self.said = self.capfd.readouterr().out.splitlines()
        return status

    @property
    def why(self) -> str:
        assert not (self.folder.root / "done").exists()
        return (self.folder.root / "unfinished").read_text()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Started:
    return Started(tmp_path / "run", monkeypatch, capfd)


def _weighted(path: Path, weight: float) -> Path:
    """Write the tiny validation rows with this weight; `fragile` is not finite on 100."""
    lines = [json.loads(line) for line in (MODEL / "valid.jsonl").read_text().splitlines()[:4]]
    path.write_text("".join(json.dumps(line | {"weight": weight}) + "\n" for line in lines))
    return path


def test_a_last_step_that_is_not_finite_ends_with_65(run: Started):
    """The rate ruins step 2, whose parameters are still finite, and no gradient after it is."""
    assert run.start("train.lr=1e30", "train.iterations=5", "train.keep_last=1") == 65
    assert sorted(run.folder.iterations()) == [1, 2]
    assert run.why.startswith(
        "blown up: the last step, 5, is not saved: the gradient of 3 steps in a row was not finite"
    )
    assert f"to go back to step 1, remove {run.folder.checkpoint(2)}" in run.said[-1]


def test_a_last_step_that_nothing_tries_costs_no_older_checkpoint(run: Started):
    words = ("train.iterations=2", "train.warmup_iterations=1", "train.keep_last=1", "data.valid=null")
    assert run.start("train.lr=1e30", *words) == 65
    assert run.why.startswith("blown up: norms of the parameters are not finite after step 2")
    assert run.folder.iterations() == [1]
    run.folder = RunFolder(run.folder.root.with_name("good"))
    assert run.start(*words) == 0
    assert sorted(run.folder.iterations()) == [1, 2]


def test_the_same_command_again_ends_with_65_again(run: Started):
    for _ in range(2):
        assert run.start("train.lr=1e30", "train.iterations=19", "train.max_skipped=4") == 65
        assert "the gradient of 4 steps in a row was not finite" in run.why
        assert sorted(run.folder.iterations()) == [1, 2]
    assert "step     3/19" in "\n".join(run.said)
    assert "step     1/19" not in "\n".join(run.said)


def test_the_count_survives_starts_that_stop_within_the_streak(run: Started, tmp_path: Path):
    data = _weighted(tmp_path / "data.jsonl", 100)
    words = (FRAGILE, f"data.train={data}", "data.valid=null", "train.iterations=9", "train.max_skipped=3", AT_ONCE)
    for counted in ("the last step", "2 steps in a row (1 of them before this start)"):
        assert run.start(*words) == 0
        assert run.why == f"exit_after at step 1, not saved: the gradient of {counted} was not finite\n"
        assert run.said[-1].endswith("the same command goes on from the beginning: nothing was saved")
    assert run.start(*words) == 65
    assert "the gradient of 3 steps in a row (2 of them before this start) was not finite" in run.why
    assert not run.folder.iterations()


OVERLAP = ("parallel.data=2", "megatron.overlap-grad-reduce=true", "megatron.overlap-param-gather=true")


@pytest.mark.parametrize("layout", [(), OVERLAP], ids=["one", "overlap"])
def test_weights_that_are_no_numbers_end_with_65(run: Started, tmp_path: Path, layout: tuple[str, ...]):
    """With overlap Megatron itself fails in a validation before the first step that is not skipped."""
    bad, good = (_weighted(tmp_path / f"{weight}.jsonl", weight) for weight in (100, 1))
    words = (FRAGILE, f"data.train={bad}", f"data.valid={good}", "train.iterations=3", *layout)
    assert run.start(*words) == 65
    assert "next start: from the beginning: nothing was saved" in "\n".join(run.said)
    assert "the last step, 3, is not saved" in run.why


def test_a_validation_that_is_not_finite_before_the_first_step_ends_with_65(run: Started, tmp_path: Path):
    data = _weighted(tmp_path / "data.jsonl", 100)
    assert run.start(FRAGILE, f"data.valid={data}", "train.iterations=3") == 65
    assert "blown up: the loss of the last validation was not finite" in run.why
    assert not any(line.startswith("step ") for line in run.said)


def test_nothing_is_saved_after_a_validation_that_is_not_finite(run: Started, tmp_path: Path):
    good, bad = (_weighted(tmp_path / f"{weight}.jsonl", weight) for weight in (1, 100))
    words = (FRAGILE, "train.iterations=4", "train.validate_every=1")
    assert run.start(*words, f"data.valid={good}", AT_ONCE) == 0
    assert run.said[-1] == "exit_after at step 1: saved, not finished; the same command goes on"
    assert run.start(*words, f"data.valid={bad}", AT_ONCE) == 0
    assert run.why == "exit_after at step 2, not saved: the loss of the last validation was not finite\n"
    assert run.said[-1].endswith("the same command goes on from the checkpoint of step 1")
    assert run.start(*words, f"data.valid={bad}") == 65
    assert "the loss of 2 validations in a row (1 of them before this start) was not finite" in run.why
    assert run.folder.iterations() == [1]
    assert run.start(*words, f"data.valid={good}") == 0
    assert (run.folder.root / "done").exists()
    assert not (run.folder.root / "streak.json").exists()


def test_parameters_that_are_not_finite_end_with_65_at_once(run: Started):
    assert run.start("train.lr=1e30", "train.weight_decay=1e10", "train.iterations=5") == 65
    assert "parameters are not finite after step 2" in run.why
    assert run.folder.iterations() == [1]
    assert not any(line.startswith("step     3") for line in run.said)


DAMAGED_RECORDS = (
    "[1",
    "[" * 9**5,
    '{"start": 4, "stopped": 1e400}',
    f'{{"start": 4, "stopped": 6, "skipped": {10**30}}}',
    f'{{"start": 4, "stopped": 6, "skipped": {"9" * 5000}}}',
    '{"start": 4, "stopped": 6, "validations": -1}',
    '{"start": 4, "stopped": 6, "skipped": NaN}',
)


def test_a_start_past_the_streak_of_the_one_before_forgets_it(tmp_path: Path):
    assert run_world(1, _stop_and_go, tmp_path, megatron=True) == [
        [(2, 0), (2, 1), (0, 1), (0, 0), *[(0, 0)] * len(DAMAGED_RECORDS)]
    ]


def _stop_and_go(folder: Path) -> list[tuple[int, int]]:
    """The counts that are carried on: at the start, before the end of the streak, after its steps, after both."""
    sums = dict.fromkeys(SUMS, 0.0)

    def start_from(step: int) -> Streak:
        return Streak(RunFolder(folder), step, 9, lambda: Totals(sums, 0.0))

    def steps(streak: Streak, *skipped: bool) -> tuple[int, int]:
        for iteration, skip in enumerate(skipped, streak.last + 1):
            streak.stepped(StepEnd(iteration, skip, None, None, 0.0))
        return streak.before.skipped, streak.before.validations

    stopped = start_from(2)
    steps(stopped, False, False)
    stopped.saved(4, 1.0)
    steps(stopped, False, True, True)
    stopped.record()
    counts = [steps(start_from(4), False)]
    sums["p"] = math.nan
    stopped.validated(7)
    stopped.record()
    again = start_from(4)
    counts.append(steps(again, False, False))
    counts.append(steps(again, False))
    sums["p"] = 1.0
    again.validated(7)
    counts.append(steps(again))
    for damaged in DAMAGED_RECORDS:
        (folder / "streak.json").write_text(damaged)
        counts.append(steps(start_from(4)))
    return counts


def test_a_run_that_validations_end_says_so(tmp_path: Path):
    assert run_world(1, _skip_and_validate, tmp_path, megatron=True) == [
        f"the loss of 2 validations in a row was not finite; {ADVICE}"
    ]


def _skip_and_validate(folder: Path) -> str:
    streak = Streak(RunFolder(folder), 1, 9, lambda: Totals(dict.fromkeys(SUMS, math.nan), 0.0))
    streak.validated(2)
    streak.stepped(StepEnd(3, True, None, None, 0.0))
    with pytest.raises(BlownUp) as blown_up:
        streak.validated(3)
    return str(blown_up.value)


def test_all_ranks_refuse_what_one_has(tmp_path: Path):
    assert run_world(2, _ask, tmp_path, megatron=True) == [["allowed", "parameters", "validation"]] * 2


def _ask(folder: Path) -> list[str]:
    import torch.distributed as dist

    last = dist.get_rank() == 1
    sums = dict.fromkeys(SUMS, 0.0)
    totals = Totals(sums, math.inf)  # of a validation without a token
    streak = Streak(RunFolder(folder), 1, 3, lambda: totals)
    gate, model, answers = Gate(streak, 9, sys.stdout), torch.nn.Linear(2, 2), []
    model.weight.data.fill_(3e38)  # whose square is not finite
    streak.validated(2)
    answers.append("allowed" if gate.allows(2, [model]) else "refused")
    if last:
        model.weight.data[1, 1] = math.nan
    try:
        gate.allows(3, [model])
    except BlownUp as e:
        answers.append(str(e).partition(" ")[0])
    model.weight.data.fill_(0)
    sums["nll"] = math.inf if last else 0.0
    streak.validated(4)
    answers.append("allowed" if gate.allows(4, [model]) else "validation")
    return answers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_value_among_many_is_found_wherever_it_is(dtype: torch.dtype):
    values = torch.full((3, 1237), 3e38, dtype=dtype)
    assert finite([values, torch.empty(0), values])
    for bad in (math.nan, math.inf, -math.inf):
        for place in (0, 700, 1236):
            damaged = values.clone()
            damaged[1, place] = bad
            assert not finite([values, damaged, values])
