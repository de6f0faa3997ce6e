"""Checksums of a prepared folder: recorded in its `prepared.json`, and checked before a run learns from its files.

A flipped bit in the rows would train on without a word. `prepared.json` holds the checksums of all other files and one
of itself.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from bft_megatron.checksums import BLOCK, Checksum, block_fault, checksum
from bft_megatron.errors import Unreadable, UserError

RECORD = "prepared.json"
QUIET_SECONDS = 3
"""Time after which a check shows its progress."""
MOST_THREADS = 16
"""Each thread holds a block of 64 MiB."""


class Damaged(UserError):
    """A prepared folder that does not hold what was written."""

    def __init__(self, folder: Path, fault: str) -> None:
        super().__init__(
            f"is damaged ({fault}): run `bft-megatron prepare RECIPE`, which prepares it anew", str(folder)
        )
        self.fault = fault


def record(folder: Path, facts: dict[str, Any]) -> None:
    """Write `prepared.json`: the facts, and the checksums of all files in the folder."""
    files = {file.name: checksum(file).as_json() for file in sorted(folder.iterdir())}
    (folder / RECORD).write_text(with_own_crc(facts | {"files": files}))


def read(folder: Path) -> dict[str, Any]:
    """Return what `record` has written.

    Raises:
        Damaged: `prepared.json` is missing, or not as it was written.
        Unreadable: the file system does not let it be read.
    """
    with _faults_of(folder, RECORD):
        return checked(json.loads((folder / RECORD).read_bytes()))


def with_own_crc(facts: dict[str, Any]) -> str:
    """Return facts as JSON with a checksum of their own, which `checked` compares."""
    return json.dumps(facts | {"crc32": _own_crc(facts)}, indent=2)


def checked(stored: Any) -> dict[str, Any]:
    """Return the facts that `with_own_crc` was given. Raises ValueError if they are not as they were written."""
    if not isinstance(stored, dict) or stored.pop("crc32", None) != _own_crc(stored):
        raise ValueError("not as it was written")
    return stored


def check(folders: Iterable[Path]) -> None:
    """Read all files of prepared folders and compare them with their checksums, in several threads.

    Shows a progress bar if that takes long and stderr is a terminal.

    Raises:
        Damaged: a file is missing, or not as it was written.
        Unreadable: the file system does not let a file be read. That is no damage.
    """
    blocks = [block for folder in folders for block in _blocks(folder)]
    pool = ThreadPoolExecutor(min(MOST_THREADS, len(os.sched_getaffinity(0))))
    try:
        for _ in _progress(pool.map(_check_block, blocks), blocks):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


_Block = tuple[Path, Checksum, int]


def _blocks(folder: Path) -> list[_Block]:
    """Return the blocks of a folder's files; compares the files' sizes."""
    found: list[_Block] = []
    for name, stored in read(folder)["files"].items():
        expected = Checksum.of_json(stored)
        with _faults_of(folder, name):
            size = (folder / name).stat().st_size
            if size != expected.size:
                raise ValueError(f"{size:,} bytes, were {expected.size:,}")
        found += [(folder / name, expected, index) for index in range(len(expected.blocks))]
    return found


def _check_block(block: _Block) -> None:
    file, expected, index = block
    with _faults_of(file.parent, file.name):
        fault = block_fault(file, expected, index)
    if fault:
        raise Damaged(file.parent, fault)


@contextmanager
def _faults_of(folder: Path, name: str) -> Iterator[None]:
    """Turn an error of reading a file into Damaged, or into Unreadable if it is the file system's."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
        raise Damaged(folder, f"{name}: {e.strerror}") from None
    except OSError as e:
        raise Unreadable.of(folder / name, e) from None
    except (RecursionError, ValueError) as e:
        raise Damaged(folder, f"{name}: {e}") from None


def _own_crc(stored: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(stored, sort_keys=True).encode())


def _progress(checked: Iterator[None], blocks: list[_Block]) -> Iterator[None]:
    console, began = Console(stderr=True), time.monotonic()
    columns = (TextColumn("checking the prepared data"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=len(blocks) * BLOCK, visible=False)
        for _ in checked:
            progress.update(task, advance=BLOCK, visible=time.monotonic() - began > QUIET_SECONDS)
            yield
