"""Checking a checkpoint for damage. Megatron fails on a missing or short file, and loads flipped bytes silently.

A torch_dist checkpoint is `.metadata` (a pickle with the place of each record), files of records, each a zip archive
written by `torch.save` with a CRC-32 for each member, which `torch.load` does not check, and `metadata.json`, written
last. The seal, written after it, has the checksums of all of them. `recovery` chooses the checkpoint to load.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bft_megatron.checksums import BLOCK, Checksum, block_fault, checksum
from bft_megatron.hf.record import crc_fault, load
from bft_megatron.hf.seal import SEAL, read_seal, sealed_fault, write_seal
from bft_megatron.hf.torch_dist import read_index

COMMON_STATE = "common_state/shard_0_1"
"""The record of what all ranks share, which Megatron reads before all others."""

_GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

_Records = dict[str, set[tuple[int, int]]]
"""Offset and length of each record, by file."""


class _Damage(Exception):
    """A fault of a checkpoint's files."""


def damage(path: Path, rank: int = 0, world: int = 1, *, contents: bool = True) -> str | None:
    """Return the first fault of a checkpoint, or None if it is intact.

    `world` callers divide the checkpoint: each checks its share of the files' sizes and blocks, and then reads the
    records that begin in its blocks as a load does, one at a time. Each of them reads `.metadata`. No collectives.

    Without a seal (the save was killed just before it, or the checkpoint was copied without it) the records' own
    CRC-32s are checked instead.

    Args:
        path: the checkpoint's own folder, such as `iter_0000006`.
        contents: whether to read the files; without, only an interrupted save and wrong sizes are found, in
            milliseconds.

    Raises:
        OSError: with `contents`, a file cannot be read for a reason that is not its content, or memory is short.
    """
    try:
        if contents:
            _check(path, rank, world)
        else:
            _check_outline(path)
    except _Damage as e:
        return str(e)
    except OSError as e:
        if contents:
            raise
        return str(e)
    return None


def seal(path: Path) -> None:
    """Write the checksums of a finished checkpoint's files beside them.

    Each rank reads the files that it has just written. Collective over all ranks: a gather of objects to rank 0, which
    writes the seal.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    written = (file for file in sorted(path.iterdir()) if not file.name.startswith(SEAL))
    own = {file.name: checksum(file) for file in written if _writer(file.name) == rank}
    gathered: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object(own, gathered)
    if gathered is not None:
        write_seal(path, {name: made for sums in gathered for name, made in sums.items()})


def _writer(name: str) -> int:
    """Return the rank that wrote a file: torch names records `__RANK_NUMBER.distcp`; rank 0 writes the others."""
    match = re.fullmatch(r"__(\d+)_\d+\.distcp", name)
    return int(match[1]) if match else 0


def _check(path: Path, rank: int, world: int) -> None:
    sealed = _seal(path)
    if sealed is None:
        records = _records(path)
        sizes = _sizes(records)
    else:
        sizes = {name: made.size for name, made in sealed.items()}
    _check_sizes(path, {name: sizes[name] for name in sorted(sizes)[rank::world]})
    own = _share(sizes, rank, world)
    if sealed is not None:
        _check_blocks(path, sealed, own)
        records = _sealed_records(path, sealed)
    for name in sorted(records):
        for offset, length in sorted(records[name]):
            if (name, offset // BLOCK) in own:
                _check_record(path / name, offset, length, sealed is not None)


def _check_outline(path: Path) -> None:
    sealed = _seal(path)
    sizes = _sizes(_records(path)) if sealed is None else {name: made.size for name, made in sealed.items()}
    _check_sizes(path, sizes)


def _seal(path: Path) -> dict[str, Checksum] | None:
    """Return the seal of a checkpoint whose save Megatron has finished, all of whose files can be opened."""
    from megatron.core.dist_checkpointing.core import maybe_load_config

    _check_kinds(path)
    with _reading(path / "metadata.json"):
        config = maybe_load_config(str(path))
    if config is None:
        raise _Damage("metadata.json: No such file or directory")
    if config.sharded_backend != "torch_dist":
        raise _Damage(f"metadata.json: sharded_backend is {config.sharded_backend!r}, should be 'torch_dist'")
    with _reading(path / SEAL):
        return read_seal(path)


def _check_kinds(path: Path) -> None:
    """Find what is neither a file nor a folder, by one listing: opening a FIFO waits for ever."""
    with _reading(path), os.scandir(path) as entries:
        odd = [entry.name for entry in entries if not (entry.is_file() or entry.is_dir())]
    if odd:
        raise _Damage(f"{min(odd)}: is no regular file")


def _check_sizes(path: Path, sizes: dict[str, int]) -> None:
    for name, expected in sizes.items():
        with _reading(path / name):
            size = (path / name).stat().st_size
        if size != expected:
            raise _Damage(f"{name}: {size} bytes, should be {expected}")


def _share(sizes: dict[str, int], rank: int, world: int) -> set[tuple[str, int]]:
    """Return the blocks of one of `world` callers, as file and number.

    Neighbouring blocks go to neighbouring ranks, so that a record over several blocks is in its node's page cache.
    """
    blocks = [(name, block) for name in sorted(sizes) for block in range(-(-sizes[name] // BLOCK))]
    return set(blocks[rank::world])


def _check_blocks(path: Path, sealed: dict[str, Checksum], own: set[tuple[str, int]]) -> None:
    for name, block in sorted(own):
        with _reading(path / name):
            fault = block_fault(path / name, sealed[name], block)
        if fault:
            raise _Damage(fault)


def _sealed_records(path: Path, sealed: dict[str, Checksum]) -> _Records:
    """Check both files that each caller reads itself, and read the index: a flipped pickle may ask for any memory."""
    for name in ("metadata.json", ".metadata"):
        with _reading(path / name):
            fault = sealed_fault(path, sealed, name)
        if fault:
            raise _Damage(fault)
    found = _records(path)
    if unsealed := found.keys() - sealed.keys():
        raise _Damage(f"{SEAL} does not name {min(unsealed)}")
    return found


def _records(path: Path) -> _Records:
    found: _Records = defaultdict(set)
    with _reading(path / ".metadata"):
        index = read_index(path / ".metadata")
        for info in index.storage_data.values():
            found[info.relative_path].add((info.offset, info.length))
    if COMMON_STATE not in index.state_dict_metadata:
        raise _Damage(f".metadata: has no {COMMON_STATE}")
    return found


def _sizes(records: _Records) -> dict[str, int]:
    return {name: max(offset + length for offset, length in found) for name, found in records.items()}


def _check_record(file: Path, offset: int, length: int, sealed: bool) -> None:
    with _reading(file):
        fault = None if sealed else crc_fault(file, offset, length)
    if fault:
        raise _Damage(fault)
    with _reading(file, f"record at {offset}: "):
        content = load(file, offset, length)
    match content:  # of the common state
        case [{"checkpoint_version": _, "iteration": int(step)}] if file.parent.name != f"iter_{step:07d}":
            raise _Damage(f"{file.name}: it is that of step {step}")


@contextlib.contextmanager
def _reading(file: Path, where: str = "") -> Iterator[None]:
    """Tell a fault of a file's content, `_Damage`, from one of the file system or of memory, an OSError with its name.

    Damaged content may make a reader raise anything.
    """
    try:
        yield
    except _GONE as e:
        raise _Damage(f"{file.name}: {e.strerror}") from e
    except MemoryError as e:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), str(file)) from e
    except Exception as e:
        if isinstance(e, OSError) and e.errno is not None:
            e.filename = e.filename or str(file)
            raise
        raise _Damage(f"{file.name}: {where}{type(e).__name__}: {e}") from e
