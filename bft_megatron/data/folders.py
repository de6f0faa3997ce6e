"""Folders that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bft_megatron.errors import UserError


@contextmanager
def appearing_whole(folder: Path) -> Iterator[Path]:
    """A folder to write in that gets its name when all is written, and is gone if that fails.

    What a killed process of this machine left unfinished beside it is removed. If another process has given the name to
    a folder of its own meanwhile, that one stays: it holds the same.

    Raises:
        UserError: there is no place to write.
    """
    host = socket.gethostname()
    part = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.{os.getpid()}.{host}"
    try:
        part.mkdir(parents=True)
        _sweep(folder.parent, host)
        yield part
        for file in part.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        part.rename(folder)
    except OSError as e:
        if not folder.exists():
            raise UserError(f"cannot write the prepared data: {e.strerror or e}", str(folder.parent)) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _sweep(parent: Path, host: str) -> None:
    """Remove the unfinished folders of processes that are no more; another machine's may still be written."""
    for path in parent.glob(f".*.{host}"):
        pid = path.name.removesuffix(f".{host}").rpartition(".")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)
