"""The folders that this process is writing under a temporary name, for the handler of a signal to remove."""

from __future__ import annotations

import shutil
from pathlib import Path

_folders: set[Path] = set()


def add(folder: Path) -> None:
    """Note a folder that is of no use to anybody before it has its final name."""
    _folders.add(folder)


def discard(folder: Path) -> None:
    """Forget a folder that has its final name, or is gone."""
    _folders.discard(folder)


def remove() -> None:
    """Remove all noted folders."""
    for folder in _folders:
        shutil.rmtree(folder, ignore_errors=True)
