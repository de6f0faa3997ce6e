"""Objectives of the family besides SFT, DFT and BFT, from log p alone; each a function of its options.

They are means over supervised tokens, and every sample counts alike: s_b = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bft_megatron.objective.records import Objective
from bft_megatron.objective.view import View


def power(alpha: float) -> Objective:
    """Return the objective whose gradient is that of (1 - p^alpha) / alpha: w_t = p_t^alpha (arXiv 2510.00526).

    alpha = 1 is DFT, and alpha towards 0 is SFT. The reported loss is the mean of p^alpha (-log p).
    """

    def weights(view: View) -> tuple[Tensor, Tensor]:
        return (alpha * view.logp.double()).exp(), torch.ones_like(view.weight)

    return Objective("power", "tokens", frozenset(), weights)


def threshold(q: float) -> Objective:
    """Return the objective that learns from tokens of probability q or more: w_t = 1 if p_t >= q, else 0.

    The hard threshold of arXiv 2510.00526 and 2601.09195. The divisor counts all supervised tokens.
    """

    def weights(view: View) -> tuple[Tensor, Tensor]:
        return (view.logp.double().exp() >= q).double(), torch.ones_like(view.weight)

    return Objective("threshold", "tokens", frozenset(), weights)


def focal(gamma: float) -> Objective:
    """Return the objective whose gradient is that of the focal loss -(1 - p)^gamma log p (arXiv 1708.02002).

    w_t = (1 - p_t)^gamma - gamma p_t (1 - p_t)^(gamma - 1) log p_t. The reported loss is the mean of w_t (-log p_t).
    """

    def weights(view: View) -> tuple[Tensor, Tensor]:
        logp = view.logp.double()
        missing = -logp.expm1()  # 1 - p, precise also if p is close to 1
        # (1 - p)^(gamma - 1) p log p is 0 at p = 1 for gamma > 0, where a power of 0 below 0 is infinite.
        slope = torch.where(missing > 0, gamma * logp.exp() * missing ** (gamma - 1) * -logp, 0.0)
        return missing**gamma + slope, torch.ones_like(view.weight)

    return Objective("focal", "tokens", frozenset(), weights)
