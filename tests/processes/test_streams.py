"""Output after its reader is gone, which is dropped, and on a full disk, which is an error."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from bft_megatron.processes.streams import lasting, outlive_readers


def test_a_pipe_without_a_reader():
    reader, writer = os.pipe()
    stream = lasting(os.fdopen(writer, "w"))
    print("heard", file=stream, flush=True)
    assert os.read(reader, 100) == b"heard\n"
    os.close(reader)
    for _ in range(2):
        print("not heard", file=stream, flush=True)
    stream.close()  # nothing is left to be written, which would fail


def test_a_full_disk():
    stream = lasting(open("/dev/full", "w"))  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        print("lost", file=stream, flush=True)


def test_streams_that_are_closed_from_the_start():
    words = ["sh", "-c", 'exec "$0" -m bft_megatron --version <&- >&- 2>&-', sys.executable]
    assert subprocess.run(words, timeout=60, check=False).returncode == 0


def test_an_encoding_that_lacks_a_character(monkeypatch: pytest.MonkeyPatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    outlive_readers()
    print("16 ▃ 128", flush=True)
    assert written.getvalue() == b"16 ? 128\n"
