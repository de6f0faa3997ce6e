"""The seal of a checkpoint: our own file in its folder, with the checksums of all files that Megatron wrote there.

It holds the folder's name too, since Megatron takes the step of a checkpoint from it.
"""

from __future__ import annotations

import json
import stat
import zlib
from pathlib import Path
from typing import Any

from bft_megatron.checksums import Checksum, checksum

SEAL = "seal.json"
"""Name of the file."""


def read_seal(folder: Path) -> dict[str, Checksum] | None:
    """Return the checksums of a checkpoint's files by name, or None if it has no seal.

    Raises OSError if the seal cannot be read; any other exception means that it is broken, or that of another step.
    """
    file = folder / SEAL
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):  # opening a FIFO waits for ever
        raise ValueError("it is no regular file")
    seal = json.loads(file.read_bytes())
    if seal.pop("crc32") != _crc32(seal):
        raise ValueError("its content does not match its own CRC-32")
    if folder.name != seal["checkpoint"] and folder.name.startswith("iter_"):  # a copy may have any other name
        raise ValueError(f"it is that of {seal['checkpoint']}")
    return {name: Checksum.of_json(made) for name, made in seal["files"].items()}


def is_complete(folder: Path) -> bool:
    """Return whether all files of a checkpoint are there, with the sizes in its seal. Reads the seal alone.

    What the file system does not let us read counts as missing.
    """
    try:
        sealed = read_seal(folder)
        if sealed is None:
            return all((folder / name).is_file() for name in ("metadata.json", ".metadata"))
        files = {folder / name: made.size for name, made in sealed.items()}
        return all(file.is_file() and file.stat().st_size == size for file, size in files.items())
    except Exception:  # a broken seal may raise anything
        return False


def write_seal(folder: Path, files: dict[str, Checksum]) -> None:
    """Write the seal of a checkpoint's files atomically. Raises OSError."""
    temporary = folder / f"{SEAL}.tmp"
    content = {"checkpoint": folder.name, "files": {name: made.as_json() for name, made in files.items()}}
    temporary.write_text(json.dumps({"crc32": _crc32(content), **content}))
    temporary.replace(folder / SEAL)


def _crc32(content: Any) -> int:
    return zlib.crc32(json.dumps(content).encode())


def sealed_fault(folder: Path, sealed: dict[str, Checksum], name: str) -> str | None:
    """Read a file and return how it differs from its checksum, or None. Raises OSError."""
    if name not in sealed:
        return f"{SEAL} does not name {name}"
    if not (folder / name).is_file():
        return f"{name} is missing or no regular file"
    if checksum(folder / name) != sealed[name]:
        return f"{name} does not have the CRC-32 that it was saved with"
    return None
