"""Reading compressed files as if they were not, a block at a time."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from bft_megatron.errors import UserError
from bft_megatron.recipe.sources import COMPRESSIONS

if TYPE_CHECKING:
    import pyarrow
    from _typeshed import WriteableBuffer

_BLOCK = 1 << 16
"""Bytes that are decompressed at a time."""


def compression(path: str) -> str | None:
    """Return how a file is compressed, by its suffix; None if it is not."""
    return COMPRESSIONS.get(Path(path).suffix.lower())


def suffix(path: str) -> str:
    """Return the suffix of what a file holds: `.jsonl` of `rows.jsonl.gz` and of `rows.jsonl`."""
    inner = Path(path).with_suffix("") if compression(path) else Path(path)
    return inner.suffix.lower()


def open_plain(path: str) -> BinaryIO:
    """Open a file to read what it holds, decompressed. Reading raises UserError where the file is damaged or cut."""
    if (name := compression(path)) is None:
        return open(path, "rb")
    import pyarrow

    return io.BufferedReader(_Decompressed(pyarrow.OSFile(path), path, name), _BLOCK)


class _Decompressed(io.RawIOBase):
    """The decompressed bytes of a file; `line` is the number of the line that they have come to."""

    def __init__(self, file: pyarrow.NativeFile, path: str, name: str) -> None:
        from pyarrow import CompressedInputStream

        self._file, self._path, self._name, self.line = file, path, name, 1
        self._plain = CompressedInputStream(file, name)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        try:
            block = self._plain.read(memoryview(buffer).nbytes)
        except OSError as e:
            said = (str(e) or type(e).__name__).splitlines()[0]
            raise UserError(
                f"not {self._name} that can be read, on this line or a later one: {said}; write or download it again",
                f"{self._path}:{self.line}",
            ) from None
        memoryview(buffer).cast("B")[: len(block)] = block
        self.line += block.count(b"\n")
        return len(block)

    def close(self) -> None:
        self._file.close()
        super().close()
