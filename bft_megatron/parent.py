"""Ending a process when the one that started it ends, however that happens (Linux)."""

from __future__ import annotations

import ctypes
import signal

_C = ctypes.CDLL(None)  # loaded before a fork, after which little may be done
_PR_SET_PDEATHSIG = 1


def end_with_it() -> None:
    """Have the kernel kill this process when its parent ends. Call it in a child, before or after its `exec`."""
    _C.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
