"""The signals by which a scheduler or a person asks a rank to save and stop; `stopping` acts on them.

Imports nothing slow, so that a rank can listen before it imports torch: an unhandled signal would end it.
"""

from __future__ import annotations

import atexit
import signal
import time
from types import FrameType

ASKING = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
"""Slurm's warning before the time limit; preemption, cancelling and the time limit itself; Ctrl-C."""

STARTED = time.monotonic()
"""Start time of this process on the monotonic clock, accurate to a few hundredths of a second."""

_received = 0


def listen() -> None:
    """Record these signals from now on instead of ending, including those blocked since the process began.

    The launcher starts ranks with the signals blocked, so that none is lost or fatal before this call.
    """
    for number in ASKING:
        signal.signal(number, _remember)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
    # The interpreter removes handlers at exit, and a signal after that would turn status 0 into a failure.
    atexit.register(_ignore)


def received() -> int:
    """Return the number of the last signal that asked this rank to save and stop, or 0."""
    return _received


def _remember(number: int, _: FrameType | None) -> None:
    global _received
    _received = number


def _ignore() -> None:
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)
