"""An objective that is not finite on some samples: on those that the data give a weight of 100."""

from __future__ import annotations

import torch

from bft_megatron.objective.records import Objective
from bft_megatron.objective.view import View


def _weights(view: View) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones_like(view.logp), torch.where(view.weight > 50, torch.nan, torch.ones_like(view.weight))


record = Objective("fragile", "samples", frozenset(), _weights)
