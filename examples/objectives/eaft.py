"""An objective of your own: entropy-adaptive fine-tuning (arXiv 2601.02151), which learns where the model is unsure.

    w_t = min(H_t / ln 20, 1)^gamma     s_b = 1     a mean over supervised tokens

H_t is the entropy of the whole distribution, where the paper takes that of the 20 likeliest tokens, which ln 20 bounds;
hence the minimum. It comes out of the pass over the vocabulary that log p is made in. In a recipe:

    objective: {name: examples.objectives.eaft:record}
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bft_megatron.objective.records import Objective
from bft_megatron.objective.view import View


def record(gamma: float) -> Objective:
    """The objective with `gamma` as the exponent."""

    def weights(view: View) -> tuple[Tensor, Tensor]:
        share = view.entropy.double() / math.log(20)
        return share.clamp(0, 1) ** gamma, torch.ones_like(view.weight)

    return Objective("eaft", "tokens", frozenset({"entropy"}), weights)
