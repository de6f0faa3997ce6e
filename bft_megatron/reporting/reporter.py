"""Reports: a line for every step and validation, to metrics.jsonl, TensorBoard and the terminal.

Megatron prints for the second step of every start the mean of the first two, and the learning rate of the step to come.
Here three functions of its training loop, which it looks up at call time, are replaced to hear of its events; the
numbers are the `meter`'s.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from bft_megatron.errors import BadSteps
from bft_megatron.reporting.totals import Meter

BY_SOURCE = ("loss", "mean_p", "samples", "tokens")
"""What a step reports of each source."""


class Reporter:
    """Hears of Megatron's steps and validations, and writes them down on the last rank, which holds the loss."""

    def __init__(
        self,
        meter: Meter,
        path: Path,
        console: TextIO,
        objective: str,
        iterations: int,
        sources: tuple[str, ...] = (),
        valid: tuple[str, ...] = (),
    ) -> None:
        """`sources` and `valid` are the names of the training's and the validation's, where they are reported apart."""
        self.meter, self.path, self.console = meter, path, console
        self.objective, self.iterations, self.sources, self.valid = objective, iterations, sources, valid
        self.iteration = 0
        self.step_seconds = 0.0
        self._learning_rate: float | None = None
        """Of the step that runs: Megatron reports that of the step after it."""
        self.skipped_in_a_row = 0
        self._max_skipped: int | None = None
        self._rows_of: Callable[[int], list[int]] | None = None
        self._clock = time.monotonic()
        self._seconds: list[float] = []
        self._validated: tuple[int, Any] | None = None

    def give_up(self, max_skipped: int, rows_of: Callable[[int], list[int]]) -> None:
        """Raise BadSteps, on every rank alike, where so many steps in a row were skipped; name the rows of each."""
        self._max_skipped, self._rows_of = max_skipped, rows_of

    def install(self, start: int) -> None:
        """Replace `train`, `training_log` and `evaluate` of Megatron's training loop; steps count on from `start`."""
        from megatron.training import training

        self.iteration = start
        if _writes():
            self._drop_lines_after(start)
        training.train = self._after_a_first_validation(training.train, training)
        training.training_log = self._reported_step(training.training_log)
        training.evaluate = self._reported(training.evaluate)

    def _after_a_first_validation(self, train: Callable[..., Any], training: Any) -> Callable[..., Any]:
        """Megatron never validates before the first step; without it nobody sees what the training changed."""

        def validate_and_train(forward_step_func: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            optimizer, _, _, valid_iterator, process_non_loss, config = args[:6]
            margs = training.get_args()
            if margs.iteration == 0 and margs.do_valid:
                hooks = training.should_disable_forward_pre_hook(margs)
                if hooks:
                    training.disable_forward_pre_hook(model, optimizer=optimizer, param_sync=False)
                training.evaluate(forward_step_func, valid_iterator, model, process_non_loss, config)
                if hooks:
                    training.enable_forward_pre_hook(model)
            self._learning_rate = training.get_canonical_lr_for_logging(optimizer.param_groups)
            self._clock = time.monotonic()
            return train(forward_step_func, model, *args, **kwargs)

        return validate_and_train

    def _reported_step(self, training_log: Callable[..., bool]) -> Callable[..., bool]:
        """`training_log`, which every rank calls after every step, with a report of its own; Megatron's goes to the
        logs.
        """

        def log_and_report(*args: Any, **kwargs: Any) -> bool:
            next_rate, iteration, _, _, skipped, grad_norm = args[2:8]
            now = time.monotonic()
            seconds, self._clock = now - self._clock, now
            self.iteration, self.step_seconds = iteration, seconds
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
            if _writes():
                totals = self.meter.totals
                line = {
                    "iteration": iteration,
                    **totals.report(),
                    "grad_norm": None if grad_norm is None else float(grad_norm),
                    "lr": None if self._learning_rate is None else float(self._learning_rate),
                    "step_seconds": round(seconds, 4),
                    "tokens_per_second": round(totals.sums["real_tokens"] / seconds, 1),
                    **self._by_source(),
                    **({"skipped": True, "rows": self._rows_of(iteration) if self._rows_of else []} if skipped else {}),
                }
                self._write(line, "train")
                self._print_step(line)
            self._learning_rate = next_rate
            result = training_log(*args, **kwargs)
            if self.skipped_in_a_row == self._max_skipped:
                raise BadSteps(f"the gradient of {self._max_skipped} steps in a row was not finite; nothing was saved")
            return result

        return log_and_report

    def _reported(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        """`evaluate` with a report of its own; the one after the last step is not run twice (Megatron does)."""

        def evaluate_and_report(*args: Any, **kwargs: Any) -> Any:
            from megatron.core import parallel_state

            if self._validated and self._validated[0] == self.iteration:
                return self._validated[1]
            result = evaluate(*args, **kwargs)
            self.meter.reduce(parallel_state.get_data_parallel_group(with_context_parallel=True))
            self._validated = (self.iteration, result)
            if _writes():
                for split, totals in [
                    ("valid", self.meter.totals),
                    *zip(self.valid, self.meter.by_source, strict=False),
                ]:
                    line = {"iteration": self.iteration, "split": split, **totals.report()}
                    self._write(line, split)
                    self._print_validation(line)
            self._clock = time.monotonic()
            return result

        return evaluate_and_report

    def _by_source(self) -> dict[str, dict[str, dict[str, float | int]]]:
        """The report of each source that had samples in the step, where sources are reported apart.

        The meter has as many sources as the training or the validation, whichever has more.
        """
        reports = {
            name: totals.report()
            for name, totals in zip(self.sources, self.meter.by_source, strict=False)
            if totals.sums["samples"]
        }
        sources = {name: {key: report[key] for key in BY_SOURCE} for name, report in reports.items()}
        return {"sources": sources} if self.sources else {}

    def _write(self, line: dict[str, Any], split: str) -> None:
        from megatron.training.global_vars import get_tensorboard_writer

        with self.path.open("a") as file:
            file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
        writer = get_tensorboard_writer()
        for name, value in line.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "iteration":
                writer.add_scalar(f"{split}/{name}", value, line["iteration"])
        for source, report in line.get("sources", {}).items():
            for name, value in report.items():
                writer.add_scalar(f"{split}/{source}/{name}", value, line["iteration"])
        writer.flush()

    def _drop_lines_after(self, start: int) -> None:
        """Steps that a killed run took after its last checkpoint are taken again: their lines must not appear twice."""
        if not self.path.exists():
            return
        kept = [
            line
            for line in self.path.read_text().splitlines()
            if _whole(line) and json.loads(line)["iteration"] <= start
        ]
        if start == 0:
            kept = []
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.replace(self.path)

    def _print_step(self, line: dict[str, Any]) -> None:
        self._seconds = [*self._seconds[-19:], line["step_seconds"]]
        left = (self.iterations - line["iteration"]) * sum(self._seconds) / len(self._seconds)
        if line.get("skipped"):
            self._print(
                f"step {line['iteration']:>5}/{self.iterations}  skipped: the gradient was not finite; rows "
                f"{', '.join(map(str, line['rows']))}"
            )
            return
        self._print(
            f"step {line['iteration']:>5}/{self.iterations}  {self._numbers(line)}  grad {line['grad_norm']:.3g}  "
            f"lr {line['lr']:.2e}  {line['tokens_per_second']:,.0f} tok/s  {_clock_time(left)} left"
        )

    def _print_validation(self, line: dict[str, Any]) -> None:
        where = "" if line["split"] == "valid" else f" on {line['split']}"
        self._print(
            f"validation at {line['iteration']:<4}  {self._numbers(line)}  over {line['tokens']:,} tokens{where}"
        )

    def _numbers(self, line: dict[str, Any]) -> str:
        return (
            f"{self.objective} {line['loss']:.4f}  lm {line['lm_loss']:.4f}  p {line['mean_p']:.4f}  "
            f"acc {line['accuracy']:.4f}  conf {line['mean_confidence']:.4f} (min {line['min_confidence']:.4f})"
        )

    def _print(self, text: str) -> None:
        print(text, file=self.console, flush=True)


def _writes() -> bool:
    """The last rank holds the loss and, in Megatron, the TensorBoard writer."""
    return dist.get_rank() == dist.get_world_size() - 1


def _finite(value: Any) -> Any:
    """The same with None for a number that is none, which JSON does not know: of a step that counted nothing."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _whole(line: str) -> bool:
    """A process killed while writing may leave half a line."""
    try:
        return "iteration" in json.loads(line)
    except ValueError:
        return False


def _clock_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
