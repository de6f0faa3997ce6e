"""Checkpoints: everything in one, and two of them compared bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp


def tensors(checkpoint: Path) -> dict[str, Any]:
    """Everything in a checkpoint: weights and Adam's moments."""
    reader = dcp.FileSystemReader(checkpoint)
    stored = {k: v for k, v in reader.read_metadata().state_dict_metadata.items() if hasattr(v, "size")}
    found = {name: torch.empty(v.size, dtype=v.properties.dtype) for name, v in stored.items()}
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def assert_same_tensors(checkpoint: Path, expected: Path) -> None:
    """Bit for bit."""
    found, wanted = tensors(checkpoint), tensors(expected)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
