"""A synchronous checkpoint save without a helper process, whose failure names its cause."""

from __future__ import annotations

import errno
import queue
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bft_megatron.upstream.change import Change

RESULTS = Change(
    "megatron.core.dist_checkpointing.strategies.filesystem_async:_results_queue",
    "replaced",
    "A synchronous save needs no queue between processes. Megatron's queue is held by a multiprocessing manager for "
    "each rank, which imports the main module again, takes seconds and 723 MB, outlives a killed rank, and is ended by "
    "the signal that requests a save.",
    "a synchronous save uses a plain queue",
    "tests/upstream/test_checkpoints.py",
)

WRITE = Change(
    "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.write_preloaded_data",
    "wrapped",
    "Megatron gives the type of a writer's error and not the error, so a full disk is `<class 'OSError'>`.",
    "a failed save says what its writer met",
    "tests/checkpoint/test_full_disk.py",
    ("write_bucket", "results_queue"),
)


def without_helper_process() -> None:
    """Give the synchronous writer a plain queue. Call it before the first save, which would start the manager."""
    RESULTS.put(queue.Queue())


def name_causes() -> None:
    """Have a save that fails name the file and the cause on every rank's behalf, and what is free on a full disk."""

    def naming(write: Callable[..., Any]) -> Callable[..., Any]:
        def write_and_name(*args: Any, **kwargs: Any) -> Any:
            given, written = WRITE.read(write, args, kwargs), write(*args, **kwargs)
            # A thread's result is in its queue; the last bucket's, by default the only one, is returned.
            if given["results_queue"] is None and isinstance(written[1], Exception):
                raise RuntimeError(_said(Path(given["write_bucket"][0]), written[1]))
            return written

        return write_and_name

    WRITE.wrap(naming)


def _said(file: Path, e: BaseException) -> str:
    """Return a sentence on the system's error behind an error: torch's writer fails anew while it is closed."""
    cause = e
    while not isinstance(cause, OSError) and cause.__context__ is not None:
        cause = cause.__context__
    if not isinstance(cause, OSError):
        return f"{file}: {type(e).__name__}: {str(e).partition(chr(10))[0]}"
    return f"{file}: {cause.strerror}{_limit(cause, file)}"


def _limit(e: OSError, file: Path) -> str:
    if e.errno == errno.ENOSPC:
        return f" ({shutil.disk_usage(file.parent).free / 2**20:,.1f} MiB free)"
    return " (this process's limit on the size of a file: `ulimit -f`)" if e.errno == errno.EFBIG else ""
