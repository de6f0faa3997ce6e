"""Redirecting a rank's output to its log file, so that only our own lines reach the terminal.

The file descriptors are redirected, because libraries print from C++ and from threads too, and before torch and
Megatron are imported, because they print during import.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from bft_megatron.errors import BlownUp, Unreadable, UserError, status
from bft_megatron.processes import ranks, streams


@contextlib.contextmanager
def output_to(log: Path) -> Iterator[TextIO]:
    """Redirect what this process prints to a file; yield the terminal, or a batch job's output in its place.

    On a failure of any kind, the traceback goes to the file and the terminal gets one line with the cause, its notes,
    and the command that resumes the run; the process exits with 1, or with `BLOWN_UP` if the run blew up. A
    UserError that every rank meets alike is left to the command line; one with notes was raised within training, by
    this rank and perhaps no other: it is printed here, and the process exits with `USER_ERROR`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    before = [os.dup(1), os.dup(2)]
    console = streams.lasting(os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors="replace"))
    with log.open("a") as file:
        _redirect([file.fileno(), file.fileno()])
    try:
        yield console
    except BaseException as e:
        with contextlib.suppress(OSError):  # the log is on the disk that may be full
            traceback.print_exc()
        if isinstance(e, UserError) and not _notes(e):
            raise
        if not _is_others(e):
            print(_last_line(e, log), file=console, flush=True)
        sys.exit(status(e))
    finally:
        _redirect(before)


def _last_line(e: BaseException, log: Path) -> str:
    said = "; ".join([f"rank {ranks.rank()}: {_what(e)}", *_room(e, log.parent), *_notes(e)])
    command = shlex.join(["bft-megatron", *sys.argv[1:]])
    return f"{said}; command: {command} (traceback in {log})"


def _room(e: BaseException, folder: Path) -> list[str]:
    """Return what is free in the run's folder if a disk is full; the error of a write does not name the file."""
    if not (isinstance(e, OSError) and e.errno == errno.ENOSPC):
        return []
    return [f"{folder.parent} has {shutil.disk_usage(folder).free / 2**20:,.1f} MiB free"]


def _what(e: BaseException) -> str:
    """Return an error in one line; that of a save or a load is the one of the first rank that failed."""
    failures = getattr(e, "failures", None)  # of torch's CheckpointException, which is no Exception
    if isinstance(failures, dict) and failures:
        rank, (cause, _) = min(failures.items())
        return f"checkpoint: rank {rank}: {_what(cause).rpartition(', error: ')[2]}"
    text = str(e).strip().partition("\n")[0]
    return text if isinstance(e, UserError) else f"{type(e).__name__}: {text}" if text else type(e).__name__


def _is_others(e: BaseException) -> bool:
    """Return whether rank 0 says it: what all ranks raise alike, and a save's or a load's failure of some of them."""
    failures = getattr(e, "failures", None)
    failed_elsewhere = failures is not None and ranks.rank() not in failures
    return ranks.rank() != 0 and (isinstance(e, BlownUp | Unreadable) or failed_elsewhere)


def _notes(e: BaseException) -> list[str]:
    return getattr(e, "__notes__", [])


def _redirect(targets: list[int]) -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a full disk
            streams.discard(stream)
    for descriptor, target in zip((1, 2), targets, strict=True):
        os.dup2(target, descriptor)
