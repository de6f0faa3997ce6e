"""The sums and counts of a step: added up on each rank, reduced over ranks, and turned into means.

Megatron's own report averages micro-batch values in fp32 and has no minimum. Here the step adds fp64 sums by source,
and one SUM and one MIN all-reduce over data and context parallel ranks give the step's totals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bft_megatron.processes.device import current_device

SUMS = (
    "loss",  # the objective, before the division
    "divisor",  # samples or supervised tokens, by the objective's `reduce`
    "nll",  # -log p over supervised tokens
    "p",
    "correct",
    "confidence",  # c_b over samples
    "without_window",  # samples whose c_b is the mean over all their tokens
    "weight",  # sample weights
    "samples",
    "tokens",  # supervised
    "real_tokens",  # all but padding
)


@dataclass(frozen=True)
class Totals:
    """The sums of one step or validation over all micro-batches and ranks."""

    sums: dict[str, float]
    min_confidence: float

    def report(self) -> dict[str, float | int]:
        """Return the reported quantities, each a sum divided by its count; NaN where nothing was counted."""
        s = self.sums
        return {
            "loss": _ratio(s["loss"], s["divisor"]),
            "lm_loss": _ratio(s["nll"], s["tokens"]),
            "mean_p": _ratio(s["p"], s["tokens"]),
            "accuracy": _ratio(s["correct"], s["tokens"]),
            "mean_confidence": _ratio(s["confidence"], s["samples"]),
            "min_confidence": self.min_confidence,
            "without_window": _ratio(s["without_window"], s["samples"]),
            "mean_weight": _ratio(s["weight"], s["samples"]),
            "samples": int(s["samples"]),
            "tokens": int(s["tokens"]),
        }


def together(totals: list[Totals]) -> Totals:
    """Combine the totals of several sources into one."""
    sums = {name: sum(t.sums[name] for t in totals) for name in SUMS}
    return Totals(sums, min(t.min_confidence for t in totals))


def _ratio(total: float, count: float) -> float:
    return total / count if count else float("nan")


class Meter:
    """The sums of the running step on this rank, by source; `reduce` makes them totals on every rank of the stage.

    Args:
        sources: the number of sources of the training or of the validation, whichever has more.
    """

    def __init__(self, sources: int = 1) -> None:
        self.sources = sources
        self._sums: Tensor | None = None
        self._minimum: Tensor | None = None
        self.by_source: list[Totals] = []

    @property
    def totals(self) -> Totals:
        """The totals over all sources, after `reduce`."""
        return together(self.by_source)

    def add(self, sums: dict[str, Tensor], min_confidence: Tensor) -> None:
        """Add one micro-batch. Does not wait for the device.

        Args:
            sums: for each name in `SUMS` the sum of each source, [sources].
            min_confidence: [sources], the lowest c_b of each source, +inf without a sample.
        """
        values = torch.stack([sums[name].double() for name in SUMS])
        self._sums = values if self._sums is None else self._sums + values
        low = min_confidence.double()
        self._minimum = low if self._minimum is None else torch.minimum(self._minimum, low)

    def reduce(self, group: dist.ProcessGroup) -> None:
        """Reduce the sums to totals and start again from zero.

        Two fp64 all-reduces over `group`, data x context parallel: SUM [11, sources] and MIN [sources].
        """
        empty = torch.zeros(len(SUMS), self.sources, dtype=torch.float64, device=current_device())
        sums = empty if self._sums is None else self._sums
        low = torch.full_like(empty[0], torch.inf) if self._minimum is None else self._minimum
        dist.all_reduce(sums, group=group)
        dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
        self.by_source = [
            Totals(dict(zip(SUMS, column, strict=True)), minimum)
            for column, minimum in zip(sums.t().tolist(), low.tolist(), strict=True)
        ]
        self._sums = self._minimum = None
