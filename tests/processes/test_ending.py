"""A rank whose user's code leaves threads behind: it ends, with its status, after the exit handlers."""

from __future__ import annotations

import subprocess
import sys

import pytest

RANK = """
import atexit, sys, threading, time
from bft_megatron.processes import ending
ending.GRACE_SECONDS = 0.1
atexit.register(print, "handled")
threading.Thread(target=time.sleep, args=({seconds},), name="endless").start()
try:
    {last}
finally:
    ending.leave_threads(sys.exception())
"""


@pytest.mark.parametrize(
    ("last", "status"), [("pass", 0), ("sys.exit()", 0), ("sys.exit(65)", 65), ("sys.exit('no')", 1), ("1 / 0", 1)]
)
def test_a_thread_that_does_not_end(last: str, status: int):
    done = _ends(1000, last)
    assert (done.returncode, done.stdout) == (status, "handled\n")
    assert "without waiting for threads that still ran: endless" in done.stderr
    assert ("ZeroDivisionError" in done.stderr) == (last == "1 / 0")


def test_a_thread_that_ends():
    done = _ends(0, "sys.exit(3)")
    assert (done.returncode, done.stdout, done.stderr) == (3, "handled\n", "")


def _ends(seconds: int, last: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", RANK.format(seconds=seconds, last=last)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
