"""The choice between torch's operators and the Triton kernels for the head's arithmetic."""

from __future__ import annotations

from typing import Literal

import torch

from bft_megatron.objective import tested_cards
from bft_megatron.objective.sums import TORCH, Kernels

Wanted = Literal["auto", "torch", "triton"]


def takes_triton(wanted: Wanted, device: torch.device) -> bool:
    """Return whether the Triton kernels compute on a device: as wanted, or by "auto" on a tested card."""
    if wanted != "auto":
        return wanted == "triton"
    return device.type == "cuda" and tested_cards.is_tested(torch.cuda.get_device_capability(device))


def kernels(wanted: Wanted, device: torch.device) -> Kernels:
    """Return the kernels that compute on a device."""
    if not takes_triton(wanted, device):
        return TORCH
    from bft_megatron.objective.triton_tiles import TRITON

    return TRITON
