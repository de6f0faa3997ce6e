"""Output after its reader is gone, which is dropped, and on a full disk, which is an error."""

from __future__ import annotations

import os

import pytest

from bft_megatron.processes.streams import lasting


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
