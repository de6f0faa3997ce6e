"""Events of Megatron's training loop, which has no callbacks: the functions that it looks up by name are wrapped.

A run subscribes to `TrainingLoop`. Only `plan` wraps the set-up and the passes.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bft_megatron.upstream import pre_hooks
from bft_megatron.upstream.change import Change

_MODULE = "megatron.training.training"
_UNTIL = "Megatron's loop has callbacks"
_TEST = "tests/upstream/test_training_loop.py"

TRAIN = Change(
    f"{_MODULE}:train",
    "wrapped",
    "Megatron never validates before the first step. The wrapper does, so that reports show what training changed.",
    "Megatron validates before the first step",
    _TEST,
    ("forward_step_func", "model", "optimizer", "valid_data_iterator", "process_non_loss_data_func", "config"),
)
TRAINING_LOG = Change(
    f"{_MODULE}:training_log",
    "wrapped",
    "Reports the end of a step on every rank, and validates after the last one, before it is saved. Megatron's own log "
    "prints, for the second step after every start, the mean of the first two. For each step it is given the learning "
    "rate of the next one, and gets the step's own here, so that every tracker has the same.",
    _UNTIL,
    _TEST,
    ("learning_rate", "iteration", "skipped_iter", "grad_norm"),
)
EVALUATE = Change(
    f"{_MODULE}:evaluate",
    "wrapped",
    "Reports a validation, and runs it only once for a step: Megatron validates again after the last step.",
    _UNTIL,
    _TEST,
    ("forward_step_func", "data_iterator", "model", "process_non_loss_data_func", "config"),
)
SAVE = Change(
    f"{_MODULE}:save_checkpoint_and_time",
    "wrapped",
    "Asks first whether the step may be saved, and reports a save and its duration. Megatron saves whatever the "
    "parameters are.",
    _UNTIL,
    _TEST,
    ("iteration", "model"),
)
GET_ARGS = Change(
    f"{_MODULE}:get_args",
    "internal",
    "Gives the iterations at which training starts and ends and whether there is a validation set.",
    _UNTIL,
    _TEST,
    (),
)
LEARNING_RATE = Change(
    f"{_MODULE}:get_canonical_lr_for_logging",
    "internal",
    "Gives the learning rate of the first step, as Megatron reports it.",
    _UNTIL,
    _TEST,
    ("param_groups",),
)

_PLANNED = "A plan assigns storages to parts and ends after the second step."
SETUP = Change(
    f"{_MODULE}:setup_model_and_optimizer",
    "wrapped",
    f"{_PLANNED} This call gives it the chunks and the optimizer.",
    _UNTIL,
    "tests/plan/test_truth.py",
)
TRAIN_STEP = Change(f"{_MODULE}:train_step", "wrapped", _PLANNED, _UNTIL, "tests/plan/test_truth.py")
FORWARD_PASS = Change(
    "megatron.core.pipeline_parallel.schedules:forward_step", "wrapped", _PLANNED, _UNTIL, "tests/plan/test_truth.py"
)
BACKWARD_PASS = Change(
    "megatron.core.pipeline_parallel.schedules:backward_step", "wrapped", _PLANNED, _UNTIL, "tests/plan/test_truth.py"
)
UPDATE = Change(
    "megatron.core.optimizer.optimizer:MegatronOptimizer.step",
    "wrapped",
    f"{_PLANNED} Set on one optimizer, not on the class.",
    _UNTIL,
    "tests/plan/test_truth.py",
)


@dataclass(frozen=True)
class StepEnd:
    """A finished step."""

    iteration: int
    skipped: bool
    """True if the gradient was not finite, so that nothing was updated."""
    grad_norm: Any
    """The norm before clipping: a number or a tensor with one element; None for a skipped step."""
    learning_rate: float | None
    """The learning rate of this step."""
    ended: float
    """`time.monotonic()` at the end of the step, before Megatron's own log."""


class TrainingLoop:
    """The events of Megatron's loop: subscribers are called on every rank, in the order of the lists.

    Args:
        iteration: the step that the run starts from.
    """

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration
        """The last finished step."""
        self.on_start: list[Callable[[], None]] = []
        """Called right before the first step."""
        self.on_step: list[Callable[[StepEnd], None]] = []
        """Called after each step."""
        self.on_validation: list[Callable[[int], None]] = []
        """Called with the iteration after each validation."""
        self.on_save: list[Callable[[int, float], None]] = []
        """Called with the iteration and the seconds that it took after each save."""
        self.may_save: Callable[[int, Any], bool] = lambda _iteration, _model: True
        """Called on every rank before each save with the iteration and this rank's chunks: False prevents the save."""
        self._given: dict[str, Any] = {}
        self._learning_rate: float | None = None
        self._validated: tuple[int, Any] | None = None

    def install(self) -> None:
        """Wrap the loop's functions for the rest of this process."""
        pre_hooks.mend()
        TRAIN.wrap(self._with_a_first_validation)
        TRAINING_LOG.wrap(self._telling_of_steps)
        EVALUATE.wrap(self._once_a_step)
        SAVE.wrap(self._saving_what_may_be)

    def _with_a_first_validation(self, train: Callable[..., Any]) -> Callable[..., Any]:
        def validate_and_train(*args: Any, **kwargs: Any) -> Any:
            from megatron.training import training

            self._given = given = TRAIN.read(train, args, kwargs)
            if training.get_args().iteration == 0:
                _validate(given, param_sync=False)
            self._learning_rate = training.get_canonical_lr_for_logging(given["optimizer"].param_groups)
            for hear in self.on_start:
                hear()
            return train(*args, **kwargs)

        return validate_and_train

    def _telling_of_steps(self, training_log: Callable[..., bool]) -> Callable[..., bool]:
        def log_and_tell(*args: Any, **kwargs: Any) -> bool:
            from megatron.training import training

            ended, given = time.monotonic(), TRAINING_LOG.read(training_log, args, kwargs)
            own = inspect.signature(training_log).bind(*args, **kwargs)
            own.arguments["learning_rate"] = self._learning_rate
            result = training_log(*own.args, **own.kwargs)
            self.iteration = given["iteration"]
            step = StepEnd(self.iteration, bool(given["skipped_iter"]), given["grad_norm"], self._learning_rate, ended)
            self._learning_rate = given["learning_rate"]  # Megatron passes the next step's
            for hear in self.on_step:
                hear(step)
            if self.iteration == training.get_args().train_iters:
                _validate(self._given, param_sync=True)
            return result

        return log_and_tell

    def _once_a_step(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        def evaluate_once(*args: Any, **kwargs: Any) -> Any:
            if self._validated and self._validated[0] == self.iteration:
                return self._validated[1]
            result = evaluate(*args, **kwargs)
            self._validated = (self.iteration, result)
            for hear in self.on_validation:
                hear(self.iteration)
            return result

        return evaluate_once

    def _saving_what_may_be(self, save: Callable[..., Any]) -> Callable[..., Any]:
        def save_and_tell(*args: Any, **kwargs: Any) -> None:
            given, start = SAVE.read(save, args, kwargs), time.monotonic()
            if not self.may_save(given["iteration"], given["model"]):
                return
            save(*args, **kwargs)
            seconds = time.monotonic() - start
            for hear in self.on_save:
                hear(given["iteration"], seconds)

        return save_and_tell


def _validate(given: dict[str, Any], *, param_sync: bool) -> None:
    """Run one validation, if there is a validation set, as Megatron's loop would, with the arguments of `train`.

    Args:
        param_sync: gather the parameters that the last step updated on other ranks; before the first step there are
            none.
    """
    from megatron.training import training

    if not training.get_args().do_valid:
        return
    with pre_hooks.off(given["model"], given["optimizer"], param_sync=param_sync):
        training.evaluate(
            forward_step_func=given["forward_step_func"],
            data_iterator=given["valid_data_iterator"],
            model=given["model"],
            process_non_loss_data_func=given["process_non_loss_data_func"],
            config=given["config"],
        )
