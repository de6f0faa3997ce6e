"""Reports of every step and validation in metrics.jsonl, in TensorBoard and on the terminal.

`upstream.training_loop` calls the reporter's methods, and `totals.Meter` provides the numbers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from bft_megatron.reporting.expert_load import ExpertLoad, dead_experts
from bft_megatron.reporting.totals import Meter
from bft_megatron.run import metrics
from bft_megatron.upstream.training_loop import StepEnd

BY_SOURCE = ("loss", "mean_p", "samples", "tokens")
"""The quantities that a step reports for each source."""


class Reporter:
    """Writer of the reports of Megatron's steps and validations, on the last rank, which holds the loss."""

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
        """Set up the reports of a run.

        Args:
            meter: the meter of the step's sums.
            path: metrics.jsonl.
            console: the terminal.
            objective: the objective's name.
            iterations: the steps of the whole run.
            sources, valid: names of the training and validation sources; empty unless they are reported separately.
        """
        self.meter, self.path, self.console = meter, path, console
        self.objective, self.iterations, self.sources, self.valid = objective, iterations, sources, valid
        self.iteration = 0
        self.step_seconds = 0.0
        self.rows_of: Callable[[int], list[int]] | None = None
        """Returns the rows of a step, which the report of a skipped step names."""
        self.load: ExpertLoad | None = None
        """The load of a mixture's experts."""
        self._clock = time.monotonic()
        self._seconds: list[float] = []

    def begin(self, start: int) -> None:
        """Count steps from `start`; on the last rank, drop the lines of later steps, which will run again."""
        self.iteration = start
        if _writes() and (damaged := metrics.drop_after(self.path, start)):
            self._print(damaged)

    def started(self) -> None:
        """Start the clock of the first step."""
        self._clock = time.monotonic()

    def stepped(self, step: StepEnd) -> None:
        """Report a step."""
        seconds, self._clock = step.ended - self._clock, step.ended
        self.iteration, self.step_seconds = step.iteration, seconds
        if _writes():
            totals = self.meter.totals
            rows = self.rows_of(step.iteration) if self.rows_of and step.skipped else []
            line = {
                "iteration": step.iteration,
                **totals.report(),
                "grad_norm": None if step.grad_norm is None else float(step.grad_norm),
                "lr": None if step.learning_rate is None else float(step.learning_rate),
                "step_seconds": round(seconds, 4),
                "tokens_per_second": round(totals.sums["real_tokens"] / seconds, 1),
                **self._by_source(),
                **(self.load.report() if self.load else {}),
                **({"skipped": True, "rows": rows} if step.skipped else {}),
            }
            self._write(line, "train")
            self._print_step(line)
            self._report_experts(step.iteration)

    def validated(self, iteration: int) -> None:
        """Report a validation. Collectives: the meter's two all-reduces over data x context parallelism."""
        from megatron.core import parallel_state

        self.meter.reduce(parallel_state.get_data_parallel_group(with_context_parallel=True))
        if _writes():
            for split, totals in [("valid", self.meter.totals), *zip(self.valid, self.meter.by_source, strict=False)]:
                line = {"iteration": iteration, "split": split, **totals.report()}
                self._write(line, split)
                self._print_validation(line)
        self._clock = time.monotonic()

    def _report_experts(self, iteration: int) -> None:
        from megatron.training.global_vars import get_tensorboard_writer

        if self.load is None:
            return
        for layer, load in self.load.by_layer.items():
            get_tensorboard_writer().add_scalar(f"train/expert_load/{layer}", load, iteration)
        if dead := self.load.newly_dead():
            self._print(dead_experts(dead))

    def _by_source(self) -> dict[str, dict[str, dict[str, float | int]]]:
        """Return the report of each source that had samples in the step, if sources are reported separately.

        The meter has as many entries as the training or the validation has sources, whichever is more.
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
    """Return whether this is the last rank, which holds the loss and, in Megatron, the TensorBoard writer."""
    return dist.get_rank() == dist.get_world_size() - 1


def _finite(value: Any) -> Any:
    """Replace NaN and inf by None, because JSON has neither; a step without supervised tokens reports NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _clock_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
