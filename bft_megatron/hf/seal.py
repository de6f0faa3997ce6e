"""The seal of a checkpoint: our own file in its folder, with the checksums of all files that Megatron wrote there."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from bft_megatron.checksums import Checksum, checksum

SEAL = "seal.json"
"""Name of the file."""


def read_seal(folder: Path) -> dict[str, Checksum] | None:
    """Return the checksums of a checkpoint's files by name, or None if it has no seal.

    Raises OSError if the seal cannot be read; any other exception means that it is broken.
    """
    try:
        content = (folder / SEAL).read_bytes()
    except FileNotFoundError:
        return None
    seal = json.loads(content)
    if seal["crc32"] != _crc32(seal["files"]):
        raise ValueError("its content does not match its own CRC-32")
    return {name: Checksum.of_json(made) for name, made in seal["files"].items()}


def write_seal(folder: Path, files: dict[str, Checksum]) -> None:
    """Write the seal of a checkpoint's files atomically. Raises OSError."""
    temporary = folder / f"{SEAL}.tmp"
    content = {name: made.as_json() for name, made in files.items()}
    temporary.write_text(json.dumps({"crc32": _crc32(content), "files": content}))
    temporary.replace(folder / SEAL)


def _crc32(files: Any) -> int:
    return zlib.crc32(json.dumps(files).encode())


def sealed_fault(folder: Path, sealed: dict[str, Checksum], name: str) -> str | None:
    """Read a file and return how it differs from its checksum, or None. Raises OSError."""
    if name not in sealed:
        return f"{SEAL} does not name {name}"
    if checksum(folder / name) != sealed[name]:
        return f"{name} does not have the CRC-32 that it was saved with"
    return None
