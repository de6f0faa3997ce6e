"""Example of your own objective: entropy-adaptive fine-tuning (arXiv 2601.02151) weights tokens by the model's entropy.

    w_t = min(H_t / ln 20, 1)^gamma     s_b = 1     a mean over supervised tokens

H_t is the entropy of the whole distribution. The paper takes that of the 20 likeliest tokens, which is at most ln 20;
hence the minimum here. It is computed in the same pass over the vocabulary as log p. In a recipe:

    objective: {name: examples.objectives.eaft:record}
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bft_megatron.objective.records import Objective
from bft_megatron.objective.view import View


def record(gamma: float) -> Objective:
    """Return the objective with `gamma` as the exponent."""

    def weights(view: View) -> tuple[Tensor, Tensor]:
        share = view.entropy.double() / math.log(20)
        return share.clamp(0, 1) ** gamma, torch.ones_like(view.weight)

    return Objective("eaft", "tokens", frozenset({"entropy"}), weights)
