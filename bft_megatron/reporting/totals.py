"""Sums over counts: what a step adds up on each rank, and what they come to over all of them.

Megatron's own report means micro-batch values in fp32 and knows no minimum. Here the step adds fp64 sums by source, and
one SUM and one MIN all-reduce over data and context parallel ranks make the step's totals.
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
    "weight",  # sample weights
    "samples",
    "tokens",  # supervised
    "real_tokens",  # all but padding
)


@dataclass(frozen=True)
class Totals:
    """One step's or validation's sums over all micro-batches and ranks."""

    sums: dict[str, float]
    min_confidence: float

    def report(self) -> dict[str, float | int]:
        """The quantities to watch, each a sum over its count; NaN where nothing was counted."""
        s = self.sums
        return {
            "loss": _ratio(s["loss"], s["divisor"]),
            "lm_loss": _ratio(s["nll"], s["tokens"]),
            "mean_p": _ratio(s["p"], s["tokens"]),
            "accuracy": _ratio(s["correct"], s["tokens"]),
            "mean_confidence": _ratio(s["confidence"], s["samples"]),
            "min_confidence": self.min_confidence,
            "mean_weight": _ratio(s["weight"], s["samples"]),
            "samples": int(s["samples"]),
            "tokens": int(s["tokens"]),
        }


def together(totals: list[Totals]) -> Totals:
    """Those of several sources as one."""
    sums = {name: sum(t.sums[name] for t in totals) for name in SUMS}
    return Totals(sums, min(t.min_confidence for t in totals))


def _ratio(total: float, count: float) -> float:
    return total / count if count else float("nan")


class Meter:
    """Sums of the running step on this rank, by source; `reduce` turns them into the step's totals on every rank of its
    stage.

    Args:
        sources: how many there are, of the training or of the validation, whichever has more.
    """

    def __init__(self, sources: int = 1) -> None:
        self.sources = sources
        self._sums: Tensor | None = None
        self._minimum: Tensor | None = None
        self.by_source: list[Totals] = []

    @property
    def totals(self) -> Totals:
        """Those of all sources, after `reduce`."""
        return together(self.by_source)

    def add(self, sums: dict[str, Tensor], min_confidence: Tensor) -> None:
        """Add one micro-batch: for all of `SUMS` the sum of each source [sources], and the lowest c_b of each (+inf
        without a sample). No host sync.
        """
        values = torch.stack([sums[name].double() for name in SUMS])
        self._sums = values if self._sums is None else self._sums + values
        low = min_confidence.double()
        self._minimum = low if self._minimum is None else torch.minimum(self._minimum, low)

    def reduce(self, group: dist.ProcessGroup) -> None:
        """All-reduce (SUM [10, sources], MIN [sources], fp64) over `group`, data x context parallel, and start anew."""
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
