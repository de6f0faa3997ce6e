"""The files that a user names on the command line: their paths, and writing them; a failure becomes a UserError."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import typer

from bft_megatron.errors import UserError
from bft_megatron.recipe.limits import home_path


def _path(text: str) -> Path:
    return Path(home_path(text))


Argument, Option = partial(typer.Argument, parser=_path), partial(typer.Option, parser=_path)
"""Typer's for a path, in which `~` is the home folder."""


def write(file: Path, text: str, what: str, *, new: bool = False) -> None:
    """Write a text to a file and print the file's name.

    Args:
        what: name of the content, for the error message.
        new: refuse to overwrite an existing file.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with file.open("x" if new else "w", encoding="utf-8") as opened:
            opened.write(text)
    except OSError as e:
        raise UserError(f"cannot write {what}: {e.strerror}", str(file)) from None
    print(f"wrote {file}")


def make_folder(file: Path) -> None:
    """Create the folder of a file before the long work whose result will be written to it.

    Raises:
        UserError: the folder cannot be created or is not writable.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write it: {e.strerror}", str(file)) from None
    if not os.access(file.parent, os.W_OK):
        raise UserError("cannot write it: no permission", str(file))
