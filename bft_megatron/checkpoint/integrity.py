"""Is a checkpoint whole? Megatron finds a missing or short file by failing, and loads flipped bytes without a word.

A torch_dist checkpoint is `.metadata` (a pickle that says which record lies where), files of records, each written by
`torch.save` as a zip archive with a CRC-32 a member, which `torch.load` does not look at, and `metadata.json`, written
last. Which checkpoint to use is `recovery`'s affair.
"""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from pathlib import Path

from bft_megatron.hf.record import crc_fault
from bft_megatron.hf.torch_dist import read_index

SEAL = "metadata.crc32"
"""Our own file in a checkpoint: the CRC-32 of `.metadata`, which has none of its own."""

_Record = tuple[int, int]  # offset, length


def damage(path: Path, rank: int = 0, world: int = 1, *, contents: bool = True) -> str | None:
    """The first fault of a checkpoint, or None where it is whole.

    The sizes of the files and the CRCs of the records are dealt over `world` callers, so that together they read the
    checkpoint once; each of them reads `.metadata`. No collectives.

    Args:
        path: the checkpoint's own folder, `iter_0000006`.
        contents: whether to read the records; without, what a save cut short leaves is found, in milliseconds.
    """
    try:
        json.loads((path / "metadata.json").read_text())
        _check_seal(path)
        files = _records(path)
    except Exception as e:  # of a pickle that was cut or flipped anything may come
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
    """Write down the CRC of a finished checkpoint's `.metadata`."""
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
