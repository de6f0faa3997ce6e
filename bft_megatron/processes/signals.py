"""What a scheduler or a person asks of a rank by SIGUSR1, SIGTERM or SIGINT: remembered here, answered in `stopping`.

Imports nothing slow, so that a rank can listen before it imports torch: a signal in those seconds would end it.
"""

from __future__ import annotations

import atexit
import signal
import time
from types import FrameType

ASKING = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
"""Slurm's warning before the time limit; preemption, cancelling and the time limit itself; Ctrl-C."""

STARTED = time.monotonic()
"""When this process began, to a few hundredths of a second."""

_received = 0


def listen() -> None:
    """From now on remember these signals in place of ending; also those that were held back since the process began.

    The launcher starts ranks with the signals blocked, so that none is lost or fatal before this.
    """
    for number in ASKING:
        signal.signal(number, _remember)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
    # The interpreter takes handlers away as it ends: the next signal would turn status 0 into a failure.
    atexit.register(_ignore)


def received() -> int:
    """Number of the last signal that asked this rank to save and stop, 0 if none did."""
    return _received


def _remember(number: int, _: FrameType | None) -> None:
    global _received
    _received = number


def _ignore() -> None:
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)
