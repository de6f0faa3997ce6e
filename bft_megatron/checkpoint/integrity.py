"""Checking a checkpoint for damage. Megatron fails on a missing or short file, and loads flipped bytes silently.

A torch_dist checkpoint is `.metadata` (a pickle with the place of each record), files of records, each a zip archive
written by `torch.save` with a CRC-32 for each member, which `torch.load` does not check, and `metadata.json`, written
last. `recovery` chooses the checkpoint to load.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bft_megatron.checksums import Checksum, checksum
from bft_megatron.hf.record import crc_fault
from bft_megatron.hf.torch_dist import read_index

SEAL = "seal.json"
"""Our own file in a checkpoint: the checksums of all its other files, which Megatron saves without them."""

_Record = tuple[int, int]  # offset, length


def damage(path: Path, rank: int = 0, world: int = 1, *, contents: bool = True) -> str | None:
    """Return the first fault of a checkpoint, or None if it is intact.

    Files (their sizes) and records (their CRCs) are divided among `world` callers, which together read the checkpoint
    once; each of them reads `.metadata`. No collectives.

    Args:
        path: the checkpoint's own folder, such as `iter_0000006`.
        contents: whether to read the records; without, only an interrupted save is found, in milliseconds.
    """
    try:
        json.loads((path / "metadata.json").read_text())
        _check_seal(path)
        files = _records(path)
    except Exception as e:  # a truncated or corrupted pickle may raise anything
        return f"{type(e).__name__}: {e}"
    for name in sorted(files)[rank::world]:
        if fault := _size(path / name, files[name]):
            return fault
    if not contents:
        return None
    records = sorted((name, record) for name in files for record in files[name])
    for name, record in records[rank::world]:
        if fault := crc_fault(path / name, *record):
            return fault
    return None


def seal(path: Path) -> None:
    """Write the checksums of a finished checkpoint's files beside them.

    Each rank reads the files that it has just written. Collective over all ranks: a gather of objects to rank 0, which
    writes the seal.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    own = {file.name: checksum(file).as_json() for file in sorted(path.iterdir()) if _writer(file.name) == rank}
    gathered: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object(own, gathered)
    if gathered is not None:
        files = {name: made for sums in gathered for name, made in sums.items()}
        temporary = path / f"{SEAL}.tmp"
        temporary.write_text(json.dumps({"files": files}))
        temporary.replace(path / SEAL)


def _writer(name: str) -> int:
    """Return the rank that wrote a file: torch names records `__RANK_NUMBER.distcp`; rank 0 writes the others."""
    match = re.fullmatch(r"__(\d+)_\d+\.distcp", name)
    return int(match[1]) if match else 0


def _check_seal(path: Path) -> None:
    if (path / SEAL).exists():
        sealed = json.loads((path / SEAL).read_text())["files"]
        if checksum(path / ".metadata") != Checksum.of_json(sealed[".metadata"]):
            raise ValueError(".metadata does not have the CRC-32 that it was saved with")


def _records(path: Path) -> dict[str, set[_Record]]:
    found: dict[str, set[_Record]] = defaultdict(set)
    for info in read_index(path / ".metadata").storage_data.values():
        found[info.relative_path].add((info.offset, info.length))
    return found


def _size(file: Path, records: set[_Record]) -> str | None:
    expected = max(offset + length for offset, length in records)
    try:
        size = file.stat().st_size
    except OSError as e:
        return f"{file.name}: {e.strerror}"
    return None if size == expected else f"{file.name}: {size} bytes, should be {expected}"
