"""The sums that training reports of each micro-batch, and their reduction at the end of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from bft_megatron.data.columns import Columns
from bft_megatron.objective.loss import LossSum
from bft_megatron.objective.records import Objective
from bft_megatron.objective.view import Geometry, View
from bft_megatron.reporting.expert_load import ExpertLoad
from bft_megatron.reporting.totals import Meter


@dataclass(frozen=True, eq=False)
class Measured:
    """A micro-batch on the last stage, after its loss."""

    objective: Objective
    geometry: Geometry
    view: View
    result: LossSum
    confidence: Tensor
    """[B] fp64, the lowest group confidence c_b of each sample"""
    without_window: Tensor
    """[B] bool, whether c_b is the mean over all tokens of the sample, for want of a window"""
    correct: Tensor
    """[N/cp] bool, whether the label is the argmax"""


Measure = Callable[[Columns, Measured], None]
"""A function that is called with each micro-batch of our data and what was measured of it."""


def into(meter: Meter) -> Measure:
    """Return a function that adds this rank's part of a micro-batch to the meter.

    Tokens count on the rank that holds them, samples on context-parallel rank 0 alone.
    """

    def add(batch: Columns, m: Measured) -> None:
        device, first = m.confidence.device, m.geometry.cp_rank == 0
        counted = m.geometry.counted.to(device, non_blocking=True)
        ours = counted if first else torch.zeros_like(counted)
        of_row = batch.source.to(device, non_blocking=True)
        source = of_row if batch.cu_seqlens is None else of_row.expand(len(counted))  # [B]

        def of_samples(x: Tensor, where: Tensor = source) -> Tensor:  # [B] -> [sources]
            return torch.zeros(meter.sources, dtype=torch.float64, device=device).index_add_(0, where, x.double())

        def of_tokens(x: Tensor) -> Tensor:  # [T] -> [sources]
            return of_samples(x, source[m.view.sample])

        tokens, samples = of_tokens(torch.ones_like(m.view.logp)), of_samples(ours)
        real = (batch.real_tokens * first).to(device, non_blocking=True)
        meter.add(
            {
                "loss": of_tokens(m.result.token_loss),
                "divisor": tokens if m.objective.reduce == "tokens" else samples,
                "nll": of_tokens(-m.view.logp),
                "p": of_tokens(m.view.logp.double().exp()),
                "correct": of_tokens(m.geometry.take(m.correct)),
                "confidence": of_samples(torch.where(ours, m.confidence, 0.0)),
                "without_window": of_samples(ours & m.without_window),
                "weight": of_samples(torch.where(ours, m.result.sample_weight, 0.0)),
                "samples": samples,
                "tokens": tokens,
                "real_tokens": of_samples(real, of_row),
            },
            torch.full((meter.sources,), torch.inf, dtype=torch.float64, device=device).scatter_reduce_(
                0, source, torch.where(counted, m.confidence, torch.inf).double(), "amin"
            ),
        )

    return add


def finalize_grads(meter: Meter, load: ExpertLoad | None = None) -> Callable[..., None]:
    """Return Megatron's `finalize_model_grads`, followed by the meter's all-reduces over data x context parallelism.

    Args:
        load: the load of a mixture's experts, reduced over all ranks after it.
    """

    def finalize(model: Any, num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        finalize_model_grads(model, num_tokens, **kwargs)
        meter.reduce(parallel_state.get_data_parallel_group(with_context_parallel=True))
        if load is not None:
            load.reduce()

    return finalize
