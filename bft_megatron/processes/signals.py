"""The signals by which a scheduler or a person asks a process to stop.

A rank ends at once while there is nothing to save: the signals keep their default action, which ends a process even
within a collective or another call that never returns. From its first step on (`hold`) it remembers them, and
`checkpoint.stopping` saves and stops after the step. A process that is no rank cleans up and ends
(`end_on_signals`).

Imports nothing slow, so that a rank can listen before it imports torch.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from bft_megatron import temporary

ASKING = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Slurm's warning before the time limit; preemption, cancelling, the time limit itself; Ctrl-C; a closed terminal."""

STARTED = time.monotonic()
"""Start time of this process on the monotonic clock, accurate to a few hundredths of a second."""

on_end: list[Callable[[], None]] = []
"""Called before a signal ends this process, which is no rank."""

_listening: tuple[signal.Signals, ...] = ()
_received = 0


def asking() -> tuple[signal.Signals, ...]:
    """Return the signals that ask this process to stop: all but a SIGHUP that `nohup` has it ignore."""
    return tuple(s for s in ASKING if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN)


def listen() -> None:
    """Have these signals end this rank at once, including those blocked since the process began.

    The launcher starts ranks with the signals blocked, so that none is lost before this call.
    """
    global _listening
    _listening = asking()
    for number in _listening:
        signal.signal(number, signal.SIG_DFL)
    # Slurm signals every process of a step, and a data worker that dies would end this rank. Workers end with it.
    os.register_at_fork(after_in_child=lambda: _ignore(ASKING))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)


def hold() -> None:
    """Record these signals from now on instead of ending: there is something to save. For a rank that listens."""
    global _listening
    for number in _listening:
        signal.signal(number, _remember)
    if _listening:
        # The interpreter removes handlers at exit, and a signal after that would turn status 0 into a failure.
        atexit.register(_ignore, _listening)
    _listening = ()


def received() -> int:
    """Return the number of the last signal that asked this rank to save and stop, or 0."""
    return _received


def end_on_signals() -> None:
    """Have these signals end this process, which is no rank, with one line and status 128 + number.

    The folders that it is writing are removed; its workers end with it.
    """
    own = os.getpid()
    for number in asking():
        signal.signal(number, lambda number, _: _end(number, own))


def _end(number: int, own: int) -> NoReturn:
    """End without an exception: Python drops one that a handler raises within a destructor or a hook of a fork.

    A worker that is being forked still has this handler; all but the process `own` end without a word.
    """
    if os.getpid() != own:
        os._exit(128 + number)
    for clean_up in [temporary.remove, *on_end]:
        clean_up()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    cursor = "\n\x1b[?25h" if os.isatty(2) else ""  # which a progress bar hides
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, f"{cursor}stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


def _remember(number: int, _: FrameType | None) -> None:
    global _received
    _received = number


def _ignore(numbers: tuple[signal.Signals, ...]) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
