"""Files that appear whole: other ranks may read them while they are written, and a process may be killed."""

from __future__ import annotations

import shutil
from pathlib import Path


def write(path: Path, text: str) -> None:
    """Write a text file atomically."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def copy(file: Path, path: Path) -> None:
    """Copy a file atomically."""
    temporary = path.with_name(f"{path.name}.tmp")
    shutil.copyfile(file, temporary)
    temporary.replace(path)
