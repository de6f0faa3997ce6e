"""Output that may lose its reader: a run goes on, and saves, after its terminal is closed."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO, cast

GONE = (errno.EIO, errno.EPIPE)
"""The errors of writing to a closed terminal, and to a pipe that nobody reads."""


class Lasting:
    """A text stream that drops what is written once its terminal or the pipe's reader is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text, unless the reader is gone."""
        try:
            return self._stream.write(text)
        except OSError as e:
            self._drop(e)
            return len(text)

    def flush(self) -> None:
        """Pass on what was written, unless the reader is gone."""
        try:
            self._stream.flush()
        except OSError as e:
            self._drop(e)

    def _drop(self, e: OSError) -> None:
        if e.errno not in GONE:
            raise e
        discard(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def lasting(stream: TextIO) -> TextIO:
    """Return the stream as one that outlives its reader."""
    return cast(TextIO, Lasting(stream))


def discard(stream: TextIO) -> None:
    """Send what the stream holds, and all that follows, nowhere: Python would try it again at exit, and fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    stream.flush()


def open_closed() -> None:
    """Open /dev/null in place of those of stdin, stdout and stderr that this process was started without.

    The next file that is opened would take the place, and get what is printed.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def outlive_readers() -> None:
    """Have stdout and stderr of this process outlive their readers, and print `?` for what their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.stdout, sys.stderr = lasting(sys.stdout), lasting(sys.stderr)
