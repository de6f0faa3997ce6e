"""An objective of your own: the focal weight, which turns away from what the model already knows.

    w_t = (1 - p_t)^gamma     s_b = 1     a mean over supervised tokens

The weight is a constant, as all weights here are: the gradient is that of -w_t log p_t and not of the focal loss, whose
weight would be differentiated too. In a recipe:

    objective: {name: examples.objectives.focal:record, gamma: 2}
"""

from __future__ import annotations

import torch
from torch import Tensor

from bft_megatron.objective.records import Objective
from bft_megatron.objective.view import View


def record(gamma: float) -> Objective:
    """The objective with `gamma` as the exponent."""

    def weights(view: View) -> tuple[Tensor, Tensor]:
        missing = -view.logp.double().expm1()  # 1 - p, with all its digits where p is nearly 1
        return missing**gamma, torch.ones_like(view.weight)

    return Objective("focal", "tokens", frozenset(), weights)
