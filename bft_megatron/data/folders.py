"""Writing a folder atomically: it appears complete or not at all, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path

from bft_megatron import temporary
from bft_megatron.errors import UserError

USERS = {errno.EACCES, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EPERM, errno.EROFS}
"""Errors that the user must mend; another try may succeed after the others, as where a disk was full."""


@contextmanager
def appearing_whole(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to write in; rename it to `folder` on success, remove it on failure.

    Unfinished folders that killed processes of this machine left beside it are removed. If another process has created
    `folder` in the meantime, that one stays: it has the same content.

    Raises:
        UserError: the folder cannot be written: no permission, or no such place.
        OSError: it cannot be written because the disk or a quota is full, or the file system fails.
    """
    host = socket.gethostname()
    part = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.{os.getpid()}.{host}"
    temporary.add(part)
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
            message = f"cannot write the prepared data: {e.strerror or e}"
            if e.errno in USERS:
                raise UserError(message, str(folder.parent)) from None
            raise OSError(f"{folder.parent}: {message}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
        temporary.discard(part)


def damaged_name(folder: Path) -> Path:
    """Return the first free of `damaged_NAME`, `damaged_NAME.2`, ... beside a folder."""
    wanted = folder.with_name(f"damaged_{folder.name}")
    numbered = (wanted.with_name(f"{wanted.name}.{number}") for number in count(2))
    return next(path for path in chain([wanted], numbered) if not path.exists())


def set_aside(folder: Path) -> Path:
    """Rename a damaged folder to its `damaged_name`, and return that.

    Raises:
        UserError: it cannot be renamed.
    """
    try:
        return folder.rename(damaged_name(folder))
    except OSError as e:
        raise UserError(f"is damaged, and cannot be renamed: {e.strerror or e}", str(folder)) from None


def _sweep(parent: Path, host: str) -> None:
    """Remove unfinished folders of this machine's dead processes; those of other machines may still be in use."""
    for path in parent.glob(f".*.{host}"):
        pid = path.name.removesuffix(f".{host}").rpartition(".")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)
