"""Random generators seeded by tensor name, so that a tensor's values don't depend on layout or drawing order."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator seeded by `seed` and the tensor's name."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
