"""The one place that multiplies: weights of tokens, samples and data with the loss of each token.

It does not divide by N: the sum and the count go to whoever has the whole global batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bft_megatron.objective.records import Objective
from bft_megatron.objective.view import Geometry, View


@dataclass(frozen=True, eq=False)
class LossSum:
    """One micro-batch's share of the objective on this context-parallel rank.

    loss: scalar fp32, a sum; attached to the graph even without a supervised token, and never a view.
    token_loss: [T] fp64, what it is the sum of, detached.
    count: its share of the divisor N.
    token_weight: [T] w_t; sample_weight: [B] s_b, without the data's own weight.
    """

    loss: Tensor
    token_loss: Tensor
    count: int
    token_weight: Tensor
    sample_weight: Tensor


def objective_sum(objective: Objective, geometry: Geometry, view: View, logp: Tensor) -> LossSum:
    """Return sum_b weight_b s_b r_b sum_t w_t (-log p_t) over this rank's tokens, and its count.

    Args:
        view: `geometry.view(logp)`.
        logp: [N/cp] fp32, log p with its gradient, for each of this rank's positions; what masked ones hold is not
            looked at.

    The count is this rank's supervised tokens, or, for a mean over samples, the counted samples, on context-parallel
    rank 0 alone. The data's weight scales a sample, never the count. Collectives: those of the objective's weights.

    Raises:
        ValueError: the objective's weights have not the shapes [T] and [B].
    """
    token_weight, sample_weight = objective.weights(view)
    if token_weight.shape != view.logp.shape or sample_weight.shape != view.n.shape:
        shapes = f"{tuple(token_weight.shape)} and {tuple(sample_weight.shape)}"
        wanted = f"{tuple(view.logp.shape)} and {tuple(view.n.shape)}"
        raise ValueError(f"objective {objective.name!r}: weights of shapes {shapes}, expected [T] and [B]: {wanted}")
    scale = view.weight.double() * sample_weight.double()
    if objective.reduce == "samples":
        scale = scale / view.n.clamp(min=1)
    coefficient = scale[view.sample] * token_weight.double()
    # The sum over no token is 0 and still has a gradient: a rank that sends none back would hang the others.
    token_loss = coefficient * -geometry.take(logp).double()
    loss = token_loss.sum().float()
    return LossSum(loss, token_loss.detach(), _count(objective, geometry, view), token_weight, sample_weight)


def _count(objective: Objective, geometry: Geometry, view: View) -> int:
    if objective.reduce == "tokens":
        return len(view.logp)
    return int(geometry.counted.sum()) if geometry.cp_rank == 0 else 0
