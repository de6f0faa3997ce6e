"""Ending a rank whose work is done, whatever the code of others has left running in it."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import traceback

GRACE_SECONDS = 3
"""Time for threads to end by themselves."""


def leave_threads(error: BaseException | None) -> None:
    """End this process if threads keep it from ending, after its exit handlers; return if there are none.

    Python waits for each thread that is no daemon, for ever if need be, and with this rank its launcher waits.

    Args:
        error: what ends the rank, for its status; None: it has done its work.
    """
    threads = [t for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
    deadline = time.monotonic() + GRACE_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    left = [thread.name for thread in threads if thread.is_alive()]
    if not left:
        return
    if error is not None and not isinstance(error, SystemExit):
        traceback.print_exception(error)
    print(f"warning: ended without waiting for threads that still ran: {', '.join(left)}", file=sys.stderr)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(_status(error))


def _status(error: BaseException | None) -> int:
    code = error.code if isinstance(error, SystemExit) else error
    return code if isinstance(code, int) else int(code is not None)
