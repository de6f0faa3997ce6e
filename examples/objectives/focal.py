"""Example of your own objective: the focal weight, which decreases for tokens that the model already predicts.

    w_t = (1 - p_t)^gamma     s_b = 1     a mean over supervised tokens

The weight is a constant, as all weights here are: the gradient is that of -w_t log p_t and not that of the focal loss,
whose weight is differentiated too. In a recipe:

    objective: {name: examples.objectives.focal:record, gamma: 2}
"""

from __future__ import annotations

import torch
from torch import Tensor

from bft_megatron.objective.records import Objective
from bft_megatron.objective.view import View


def record(gamma: float) -> Objective:
    """Return the objective with `gamma` as the exponent."""

    def weights(view: View) -> tuple[Tensor, Tensor]:
        missing = -view.logp.double().expm1()  # 1 - p, precise also if p is close to 1
        return missing**gamma, torch.ones_like(view.weight)

    return Objective("focal", "tokens", frozenset(), weights)
