"""Files that a user names for a command to write: written, or refused in a line."""

from __future__ import annotations

import os
from pathlib import Path

from bft_megatron.errors import UserError


def write(file: Path, text: str, what: str, *, new: bool = False) -> None:
    """Write a text and say so.

    Args:
        what: what it is, for the error.
        new: refuse a file that exists.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with file.open("x" if new else "w", encoding="utf-8") as opened:
            opened.write(text)
    except OSError as e:
        raise UserError(f"cannot write {what}: {e.strerror}", str(file)) from None
    print(f"wrote {file}")


def make_folder(file: Path) -> None:
    """Make the folder of a file that is written at the end of long work. Raises UserError where it cannot be."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write it: {e.strerror}", str(file)) from None
    if not os.access(file.parent, os.W_OK):
        raise UserError("cannot write it: no permission", str(file))
