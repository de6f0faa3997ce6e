"""CRC-32 checksums of files, block by block, so that several ranks or threads share the reading of one large file."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK = 1 << 26
"""Bytes of a block; the last one of a file may be shorter."""


@dataclass(frozen=True)
class Checksum:
    """The checksum of a file.

    Attributes:
        size: bytes of the file.
        blocks: CRC-32 of each block.
    """

    size: int
    blocks: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the checksum as a value that `of_json` reads."""
        return {"size": self.size, "crc32": list(self.blocks)}

    @classmethod
    def of_json(cls, value: Any) -> Checksum:
        """Return the checksum that `as_json` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        found = cls(int(value["size"]), tuple(int(block) for block in value["crc32"]))
        if len(found.blocks) != -(-found.size // BLOCK):
            raise ValueError(f"{len(found.blocks)} blocks for {found.size} bytes")
        return found


def checksum(file: Path) -> Checksum:
    """Read a file and return its checksum. Raises OSError."""
    size, blocks = 0, []
    with file.open("rb") as opened:
        while block := opened.read(BLOCK):
            size += len(block)
            blocks.append(zlib.crc32(block))
    return Checksum(size, tuple(blocks))


def block_fault(file: Path, expected: Checksum, index: int) -> str | None:
    """Read one block of a file and return how it differs from its checksum, or None. Raises OSError."""
    with file.open("rb") as opened:
        opened.seek(index * BLOCK)
        found = zlib.crc32(opened.read(BLOCK))
    if found == expected.blocks[index]:
        return None
    return f"{file.name}: bytes from {index * BLOCK:,} have CRC-32 {found}, were written with {expected.blocks[index]}"
