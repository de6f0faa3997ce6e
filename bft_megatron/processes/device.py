"""The device that this rank computes on, under one name."""

from __future__ import annotations

import torch


def current_device() -> torch.device:
    """Return this rank's GPU; where `upstream.cuda_on_cpu` is installed what it redirects to, the CPU or `meta`."""
    return torch.device(torch.cuda.current_device())
