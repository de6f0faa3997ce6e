"""Checking a record of a torch_dist file against its CRC-32s.

A record is a zip archive written by `torch.save` with a CRC-32 for each member, which `torch.load` does not check.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO


def crc_fault(file: Path, offset: int, length: int) -> str | None:
    """Read the record of `length` bytes at `offset` of a file; return a description of its fault, or None."""
    try:
        with file.open("rb") as whole, zipfile.ZipFile(_Window(whole, offset, length)) as archive:
            bad = archive.testzip()
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, ValueError) as e:
        return f"{file.name}: record at {offset}: {e}"
    return f"{file.name}: record at {offset}: {bad} does not match its CRC-32" if bad else None


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
