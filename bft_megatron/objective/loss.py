"""The objective's loss of a micro-batch: each token's loss times the weights of the token, the sample and the data.

Nothing is divided by N here: the sum and the count go to the caller, which has the whole global batch.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import Tensor

from bft_megatron.errors import FieldError
from bft_megatron.objective.records import Objective
from bft_megatron.objective.view import Geometry, View


@dataclass(frozen=True, eq=False)
class LossSum:
    """One micro-batch's share of the objective on this context-parallel rank.

    loss: scalar fp32, a sum; attached to the graph even without supervised tokens, and never a view.
    token_loss: [T] fp64, the terms of that sum, detached.
    count: this rank's share of the divisor N.
    token_weight: [T], w_t.
    sample_weight: [B], s_b without the weight that the data give.
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
        logp: [N/cp] fp32, log p with its gradient, for each of this rank's positions; values at positions without a
            label are ignored.

    The count is the number of this rank's supervised tokens; for a mean over samples it is the number of counted
    samples on context-parallel rank 0, and 0 on the others. The data's weight scales a sample, never the count.
    Collectives: those of the objective's weights.

    Raises:
        FieldError: the objective's weights are not two floating-point tensors of the shapes [T] and [B] on the view's
            device.
    """
    token_weight, sample_weight = _weights(objective, view)
    scale = view.weight.double() * sample_weight.double()
    if objective.reduce == "samples":
        scale = scale / view.n.clamp(min=1)
    coefficient = scale[view.sample] * token_weight.double()
    # A sum over no tokens is 0 and still has a gradient: a rank without one would skip the backward pass's collectives
    # and hang the others.
    token_loss = coefficient * -geometry.take(logp).double()
    loss = token_loss.sum().float()
    return LossSum(loss, token_loss.detach(), _count(objective, geometry, view), token_weight, sample_weight)


def _count(objective: Objective, geometry: Geometry, view: View) -> int:
    if objective.reduce == "tokens":
        return len(view.logp)
    return int(geometry.counted.sum()) if geometry.cp_rank == 0 else 0


def _weights(objective: Objective, view: View) -> tuple[Tensor, Tensor]:
    weights: object = objective.weights(view)
    if not (isinstance(weights, tuple | list) and len(weights) == 2 and all(isinstance(w, Tensor) for w in weights)):
        raise _wrong(objective, f"returns {type(weights).__name__}, not two tensors, of the tokens and of the samples")
    for what, weight, like in zip(("tokens", "samples"), weights, (view.logp, view.n), strict=True):
        if weight.shape != like.shape:
            raise _wrong(objective, f"{what}' weights have the shape {tuple(weight.shape)}, not {tuple(like.shape)}")
        if not weight.is_floating_point():
            raise _wrong(objective, f"{what}' weights are of {weight.dtype}, which is no floating-point type")
        if weight.device != like.device:
            raise _wrong(objective, f"{what}' weights are on {weight.device}, the view is on {like.device}")
    return weights[0], weights[1]


def _wrong(objective: Objective, fault: str) -> FieldError:
    """Return the error of weights that cannot be used, with the place of the function that returned them."""
    code = getattr(inspect.unwrap(objective.weights), "__code__", None)
    place = f"{code.co_filename}:{code.co_firstlineno}: " if code else ""
    return FieldError("objective.name", f"{place}objective {objective.name!r}: {fault}")
