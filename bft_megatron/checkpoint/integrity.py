"""Checking a checkpoint for damage. Megatron fails on a missing or short file, and loads flipped bytes silently.

A torch_dist checkpoint is `.metadata` (a pickle with the place of each record), files of records, each a zip archive
written by `torch.save` with a CRC-32 for each member, which `torch.load` does not check, and `metadata.json`, written
last. `recovery` chooses the checkpoint to load.
"""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from pathlib import Path

from bft_megatron.hf.record import crc_fault
from bft_megatron.hf.torch_dist import read_index

SEAL = "metadata.crc32"
"""Our own file in a checkpoint: the CRC-32 of `.metadata`, which Megatron saves without one."""

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
    """Write the CRC-32 of a finished checkpoint's `.metadata` beside it."""
    temporary = path / f"{SEAL}.tmp"
    temporary.write_text(str(zlib.crc32((path / ".metadata").read_bytes())))
    temporary.replace(path / SEAL)


def _check_seal(path: Path) -> None:
    if (path / SEAL).exists():
        expected, found = (path / SEAL).read_text(), str(zlib.crc32((path / ".metadata").read_bytes()))
        if expected != found:
            raise ValueError(f".metadata has CRC-32 {found}, was saved with {expected}")


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
