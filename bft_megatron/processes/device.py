"""The device on which this rank computes."""

from __future__ import annotations

import torch


def current_device() -> torch.device:
    """Return this rank's GPU; if `upstream.cuda_on_cpu` is installed, the CPU or `meta` device that replaces it."""
    return torch.device(torch.cuda.current_device())
