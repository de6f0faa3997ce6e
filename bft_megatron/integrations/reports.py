"""Reports of a micro-batch and checks of its loss, in the form of Megatron's loops."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.rerun_state_machine import get_rerun_state_machine
from torch import Tensor

from bft_megatron.training.measuring import Measured
from bft_megatron.training.step import LossFunction


def sums(measured: Measured) -> dict[str, Tensor]:
    """Return what was measured as pairs [sum, count] fp32 of this rank, which Megatron adds over the ranks and divides.

    Tokens count on the rank that holds them, samples on context-parallel rank 0 alone.
    """
    view, result, geometry = measured.view, measured.result, measured.geometry
    first = geometry.cp_rank == 0
    counted = geometry.counted.to(view.logp.device, non_blocking=True) & first
    samples, tokens = counted.sum(), view.logp.new_tensor(len(view.logp))
    pairs = {
        f"{measured.objective.name} loss": (result.loss.detach(), view.logp.new_tensor(result.count)),
        "lm loss": (-view.logp.double().sum(), tokens),
        "mean p": (view.logp.double().exp().sum(), tokens),
        "accuracy": (geometry.take(measured.correct).sum(), tokens),
        "confidence": (torch.where(counted, measured.confidence, 0.0).sum(), samples),
    }
    return {name: torch.stack([x.float() for x in pair]) for name, pair in pairs.items()}


def over_context(report: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Return a report whose sums and counts are those over the context-parallel group. One SUM all-reduce of all."""
    total = torch.stack(list(report.values()))
    dist.all_reduce(total, group=group)
    return dict(zip(report, total, strict=True))


def checked(function: LossFunction, *, not_finite: bool, spiky: bool, factor: float = 10.0) -> LossFunction:
    """Return a loss function with the checks that Megatron's own makes: their faults are found again and reported.

    Args:
        not_finite: whether NaN and infinity end the run.
        spiky: whether a loss above `factor` times the largest so far is reported.
    """

    def check(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loss, count, report = function(output)
        machine = get_rerun_state_machine()
        faults: list[tuple[bool, Callable[[Tensor], Any], str, bool]] = [
            (not_finite, torch.isnan, "found NaN in local forward loss calculation", True),
            (not_finite, torch.isinf, "found Inf in local forward loss calculation", True),
            (spiky, partial(machine.is_unexpectedly_large, threshold=factor, context="loss"), "Spiky loss", False),
        ]
        for wanted, fault, message, fatal in faults:
            if wanted:
                machine.validate_result(loss, rejection_func=fault, message=message, tolerance=0.0, fatal=fatal)
        return loss, count, report

    return check
