"""Example of your own objective: the token weight relative to the confidence of the tokens before it.

One reading of "group-normalised token reweighting" in the 2026 revision of the BFT paper (arXiv 2511.21075v3):

    w_t = clip(p_t / C_t, 0, 1)     C_t: mean p of the g supervised tokens that end at t
    s_b = 1 - min over t of C_t

where a sample's first g - 1 tokens, and samples shorter than g, take the sample's mean as C_t. In a recipe:

    objective: {name: examples.objectives.group_normalised:record, group_size: 256}
"""

from __future__ import annotations

import torch
from torch import Tensor

from bft_megatron.objective.records import Objective
from bft_megatron.objective.view import View


def record(group_size: int) -> Objective:
    """Return the objective for windows of `group_size` supervised tokens."""

    def weights(view: View) -> tuple[Tensor, Tensor]:
        p = view.logp.double().exp()
        around, mean = view.windows(p, group_size), view.mean(p)
        around = torch.where(around.isinf(), mean[view.sample], around)  # [T]
        lowest = torch.where(view.n > 0, view.min(around), 0.0)  # [B]
        return (p / around).clamp(0, 1), 1 - lowest

    return Objective("group_normalised", "samples", frozenset(), weights)
