"""The objectives from hidden states and the output layer's weight, without logits; the vocabulary is not sharded."""

from __future__ import annotations

import torch
from torch import Tensor

from bft_megatron.hf.samples import batch_geometry
from bft_megatron.objective import records
from bft_megatron.objective.kernels import kernels
from bft_megatron.objective.linear_logprobs import vocab_parallel_linear_statistics
from bft_megatron.objective.loss import objective_sum
from bft_megatron.objective.records import Objective
from bft_megatron.objective.sums import Statistics
from bft_megatron.objective.view import Geometry


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    objective: Objective = records.bft,
    position_ids: Tensor | None = None,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Return the objective's loss of a batch, a scalar fp32, without the logits [b, s, v] ever in memory.

    Args:
        hidden: [b, s, h], the input of the output layer, of the weight's dtype and device.
        weight: [v, h], the output layer's. It must have no bias, and the logits no soft cap or scale after it.
        labels: [b, s] int64, not shifted, -100 where not supervised.
        objective: any record of `bft_megatron.objective.records`.
        position_ids: [b, s] or [1, s]; needed where a row packs several samples.
        num_items: the divisor: the number of samples, or of supervised tokens, in the whole global batch; by default
            those of this batch.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    geometry = batch_geometry(labels, position_ids)
    found = chunked_statistics(hidden, weight, geometry, entropy="entropy" in objective.needs)
    total = objective_sum(objective, geometry, geometry.view(found.logp, found.entropy), found.logp)
    items = total.count if num_items is None else num_items
    return total.loss / torch.as_tensor(items, device=total.loss.device).clamp(min=1)


def chunked_statistics(hidden: Tensor, weight: Tensor, geometry: Geometry, *, entropy: bool) -> Statistics:
    """Return log p of each position's label, and the entropy if asked for, each [b * s] fp32.

    `hidden` and `weight` are those of `chunked_loss`, `geometry` is the batch's.
    """
    found = vocab_parallel_linear_statistics(
        hidden.flatten(0, 1)[:, None],
        weight,
        geometry.labels[:, None],
        entropy=entropy,
        kernels=kernels("auto", hidden.device),
    )
    return Statistics(found.logp[:, 0], found.correct[:, 0], None if found.entropy is None else found.entropy[:, 0])
