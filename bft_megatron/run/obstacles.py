"""Checking that nothing but a regular file, such as a folder, stands where a run has its own files."""

from __future__ import annotations

import os

from bft_megatron.errors import UserError
from bft_megatron.run.folder import RunFolder


def check(folder: RunFolder) -> None:
    """Raise UserError if one of a run's own files is a folder, or a FIFO, which would be waited for without end."""
    own = (folder.config, folder.trained_on, folder.metrics, folder.tracker, folder.base)
    marks = (folder.root / name for name in ("unfinished", "done", "streak.json"))
    for path in (*own, *marks):
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"is {'a folder' if path.is_dir() else 'no regular file'}: move it away", str(path))
