"""Megatron's training loop, in a real run of one process: which functions it looks up, when, and with what.

Counters lie under the changes that a run makes, so they see what Megatron itself would do and what is left of it.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bft_megatron.hf.architectures import read_config
from bft_megatron.run.folder import RunFolder
from bft_megatron.run.prepared import prepare_rows
from bft_megatron.upstream import signal_handler, training_loop
from bft_megatron.upstream.change import Change
from tests.helpers.runs import MODEL, Case, Layout, make_recipe, read_metrics, train_rank, write_data
from tests.helpers.world import run_world

STEPS = 3


class Seen:
    """Calls of Megatron's own functions."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.order: list[str] = []
        """The functions in the order in which they are called."""
        self.rates: list[float] = []
        """What `training_log` is given."""

    def count(self, change: Change) -> None:
        """Count the calls that reach the original."""

        def counted(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.calls[change.name] += 1
                self.order.append(change.name)
                if change is training_loop.TRAINING_LOG:
                    self.rates.append(change.read(original, args, kwargs)["learning_rate"])
                return original(*args, **kwargs)

            return call

        change.wrap(counted)


def _run(made: Any, prepared: Any) -> Seen:
    seen = Seen()
    evaluations = Change("megatron.training.training:evaluate_and_print_results", "wrapped", "", "", "", ())
    asked = Change("megatron.training.training:get_signal_handler", "wrapped", "", "", "", ())
    for change in (training_loop.TRAIN, training_loop.TRAINING_LOG, training_loop.EVALUATE, training_loop.SAVE):
        seen.count(change)
    for change in (evaluations, asked):
        seen.count(change)
    train_rank(made, prepared, lambda: None)
    return seen


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Seen, Path]:
    """Three steps, validated before the first, after the second and after the last; saved after each."""
    folder = tmp_path_factory.mktemp("loop")
    write_data(folder)
    words = ("train.validate_every=2", "train.lr=1e-3", "train.min_lr=0", "train.keep_last=9")
    made = make_recipe(folder / "run", folder, Case(), Layout(), STEPS, *words)
    prepared = prepare_rows(made, MODEL, read_config(MODEL).vocab_size)
    [seen] = run_world(1, _run, made, prepared, megatron=True)
    return seen, RunFolder.of(made).metrics


def test_the_loop_looks_its_functions_up_when_it_calls_them(run: tuple[Seen, Path]):
    calls = run[0].calls
    assert calls["train"] == 1
    assert calls["training_log"] == calls["save_checkpoint_and_time"] == calls["get_signal_handler"] == STEPS


def test_megatron_validates_again_after_the_last_step_and_a_run_does_not(run: tuple[Seen, Path]):
    seen, metrics = run
    assert seen.calls["evaluate_and_print_results"] == 2  # after the second step and after the last
    assert seen.calls["evaluate"] == 3  # besides those before the first
    assert [line["iteration"] for line in read_metrics(metrics)[1] if line["split"] == "valid"] == [0, 2, STEPS]


def test_megatron_validates_after_it_saved_the_last_step_and_a_run_before(run: tuple[Seen, Path]):
    saved, evaluated, said = (
        len(run[0].order) - run[0].order[::-1].index(name)
        for name in ("save_checkpoint_and_time", "evaluate", "evaluate_and_print_results")
    )
    assert evaluated < saved < said


def test_megatron_saves_by_one_function_alone():
    """So that a save that is not allowed does not happen: each call in the loop is looked up by that name."""
    from megatron.training import training

    for function in (training.pretrain, training.train, training.checkpoint_and_decide_exit):
        source = inspect.getsource(function)
        assert "save_checkpoint_and_time(" in source
        assert not re.search(r"\bsave_checkpoint\(", source)


def test_a_save_that_is_not_allowed_does_not_happen_and_is_not_told(monkeypatch: pytest.MonkeyPatch):
    from megatron.training import training

    saved: list[int] = []

    def save_checkpoint_and_time(iteration: int, model: list[Any]) -> None:
        saved.append(iteration)

    monkeypatch.setattr(training, "save_checkpoint_and_time", save_checkpoint_and_time)
    loop, told = training_loop.TrainingLoop(0), []
    loop.may_save = lambda iteration, model: iteration != 2 and model == ["chunk"]
    loop.on_save.append(lambda iteration, _: told.append(iteration))
    training_loop.SAVE.wrap(loop._saving_what_may_be)
    for iteration in (1, 2, 3):
        training.save_checkpoint_and_time(iteration, ["chunk"])
    assert saved == told == [1, 3]


def test_every_report_has_the_rate_that_the_step_used(run: tuple[Seen, Path]):
    """Megatron passes its log the next step's: the first would be missing, and the last of another step."""
    seen, metrics = run
    lines, _ = read_metrics(metrics)
    rates = [line["lr"] for line in lines]
    assert seen.rates == rates
    assert rates == sorted(set(rates), reverse=True)
    assert rates[0] == 1e-3
    events = EventAccumulator(str(metrics.parent / "tensorboard")).Reload()
    for name in ("learning-rate", "train/lr"):
        assert [event.value for event in events.Scalars(name)] == pytest.approx(rates)


def test_megatrons_own_line_for_the_second_step_means_the_first_two():
    """Why the printed line is not what is reported: the first iteration resets no sums."""
    from megatron.training import training

    assert "is_first_iteration" in inspect.signature(training.training_log).parameters
    assert "should_reset = not is_first_iteration" in inspect.getsource(training.training_log)


def test_megatron_asks_what_stands_for_its_signal_handler(monkeypatch: pytest.MonkeyPatch):
    from megatron.training import global_vars, training

    for change in (signal_handler.SET_HANDLER, signal_handler.HANDLER):
        monkeypatch.setattr(global_vars, change.name, getattr(global_vars, change.name))
    answers = iter([False, True])
    signal_handler.ask(lambda: next(answers))
    global_vars._set_signal_handler(None)
    assert [global_vars.get_signal_handler().signals_received() for _ in range(2)] == [[False], [True]]
    assert "any(signal_handler.signals_received())" in inspect.getsource(training.checkpoint_and_decide_exit)
