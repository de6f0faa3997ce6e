"""Reading a record of a torch_dist file: its CRC-32s, and what torch makes of it.

A record is a zip archive written by `torch.save` with a CRC-32 for each member, which `torch.load` does not check.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

_FOLDER = 0x10
"""A bit of a member's attributes, without a CRC-32. With it torch takes what is in memory for the member's bytes."""


def crc_fault(file: Path, offset: int, length: int) -> str | None:
    """Read the record of `length` bytes at `offset` of a file; return a description of its fault, or None.

    Raises OSError or MemoryError if the file cannot be read at all.
    """
    with file.open("rb") as whole:
        window = _Window(whole, offset, length)
        try:
            fault = _archive_fault(window)
        except (EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, OverflowError, LookupError) as e:
            if window.failure is not None:  # zipfile reports it as a BadZipFile
                raise window.failure from e
            fault = str(e)
    return f"{file.name}: record at {offset}: {fault}" if fault else None


def _archive_fault(window: _Window) -> str | None:
    with zipfile.ZipFile(window) as archive:
        if bad := archive.testzip():
            return f"{bad} does not match its CRC-32"
        folders = [member.filename for member in archive.infolist() if member.external_attr & _FOLDER]
        return f"{folders[0]} is marked as a folder" if folders else None


def load(file: Path, offset: int, length: int) -> Any:
    """Return the tensor or the plain values of a record, read by torch, which executes nothing in it.

    Raises OSError or MemoryError if the file cannot be read at all; anything else means that the record is broken.
    """
    with file.open("rb") as whole:
        window = _Window(whole, offset, length)
        try:
            return torch.load(io.BufferedReader(window), map_location="cpu", weights_only=True)
        except Exception as e:
            if window.failure is not None:  # torch's C++ code reports it as an AttributeError
                raise window.failure from e
            if _lacks_memory(e, length):
                raise MemoryError(str(e)) from e
            raise


def _lacks_memory(e: Exception, length: int) -> bool:
    """Return whether torch's allocator failed, unless it was asked for more than the record can hold."""
    asked = re.search(r"tried to allocate (\d+) bytes", str(e))
    return asked is not None and int(asked[1]) <= length


class _Window(io.RawIOBase):
    """A part of a file, as a file, which keeps the error of a read that failed."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0
        self.failure: OSError | MemoryError | None = None

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = min(max(0, base + offset), self._length)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = self._length - self._at  # a broken archive may ask for any number
        return super().read(left if size is None or size < 0 else min(size, left)) or b""

    def readinto(self, buffer: Any) -> int:
        try:
            self._file.seek(self._start + self._at)
            n = self._file.readinto(memoryview(buffer)[: self._length - self._at])
        except (OSError, MemoryError) as e:
            self.failure = e
            raise
        self._at += n
        return n
