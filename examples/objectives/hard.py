"""Example of your own objective, with an option: weights that decrease for tokens that the model already predicts.

    w_t = (1 - p_t)^tau     s_b = 1     a mean over supervised tokens

The weight is a constant, as all weights here are: the gradient is that of -w_t log p_t with w_t held. In a recipe:

    objective: {name: examples.objectives.hard:record, options: {tau: 2}}
"""

from __future__ import annotations

import torch
from torch import Tensor

from bft_megatron.objective.records import Objective
from bft_megatron.objective.view import View


def record(tau: float = 1.0) -> Objective:
    """Return the objective with `tau` as the exponent."""

    def weights(view: View) -> tuple[Tensor, Tensor]:
        missing = -view.logp.double().expm1()  # 1 - p, precise also if p is close to 1
        return missing**tau, torch.ones_like(view.weight)

    return Objective("hard", "tokens", frozenset(), weights)
