"""A rank that fails in any way: one line on the terminal, the traceback in its log, and a status that says so."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from bft_megatron.errors import FieldError
from bft_megatron.processes.terminal import output_to

FAILED_WRITE = RuntimeError("Worker failure: An error is caught while starting worker 0, error: a.distcp: disk full")
FAILED_READ = CheckpointException(
    "read", {3: _wrap_exception(ValueError("bad\nrecord")), 5: _wrap_exception(KeyError())}
)


class Noted(FieldError):
    """An error that was raised within training."""

    def __init__(self) -> None:
        super().__init__("objective.name", "mine.py:3: no")
        self.add_note("after step 2")


@pytest.mark.parametrize(
    ("error", "rank", "status", "line"),
    [
        (SystemExit(0), 1, 1, "rank 1: SystemExit: 0; command: "),
        (SystemExit(), 0, 1, "rank 0: SystemExit; command: "),
        (KeyboardInterrupt(), 0, 1, "rank 0: KeyboardInterrupt; command: "),
        (
            CheckpointException("write", {1: _wrap_exception(FAILED_WRITE)}),
            0,
            1,
            "rank 0: checkpoint: rank 1: a.distcp: d",
        ),
        (FAILED_READ, 0, 1, "rank 0: checkpoint: rank 3: ValueError: bad; command: "),
        (CheckpointException("write", {}), 1, 1, None),
        (FAILED_READ, 4, 1, None),
        (FAILED_READ, 5, 1, "rank 5: checkpoint: rank 3: ValueError: bad; command: "),
        (Noted(), 1, 2, "rank 1: objective.name: mine.py:3: no; after step 2; command: "),
        (FieldError("megatron.x", "no such flag"), 1, FieldError, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_one_line(
    error: BaseException, rank: int, status: object, line: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RANK", str(rank))
    ended, said, log = _ends(error, tmp_path)
    assert ended == status
    assert said.startswith(line) if line else said == ""
    assert said.count("\n") == (1 if line else 0)
    assert f"{type(error).__name__}" in log


def test_a_full_disk_that_the_log_is_on_too(tmp_path: Path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank").symlink_to("/dev/full")
    ended, said, _ = _ends(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), tmp_path)
    assert ended == 1
    assert re.fullmatch(
        rf"rank 0: OSError: \[Errno 28\] No space left on device; {tmp_path} has [\d,.]+ MiB free; "
        rf"command: bft-megatron train \(traceback in {tmp_path}/logs/rank\)\n",
        said,
    )


def _ends(error: BaseException, folder: Path) -> tuple[object, str, str]:
    """What a process that meets an error ends with, says and writes to its log; in a process of its own."""
    log = folder / "logs/rank"
    return _in_a_process(folder, lambda: _meet(error, log)), (folder / "said").read_text(), _text(log)


def _text(log: Path) -> str:
    return "" if log.is_symlink() else log.read_text()


def _meet(error: BaseException, log: Path) -> object:
    sys.argv = ["bft-megatron", "train"]
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    try:
        with output_to(log):
            print("Megatron's own")
            raise error
    except SystemExit as e:
        return e.code
    except FieldError:
        return FieldError


def _in_a_process(folder: Path, call: Callable[[], object]) -> object:
    pid = os.fork()
    if pid == 0:
        terminal = os.open(folder / "said", os.O_WRONLY | os.O_CREAT)
        os.dup2(terminal, 1)
        os.dup2(terminal, 2)
        ended = call()
        os._exit(ended if isinstance(ended, int) else 200)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return FieldError if status == 200 else status
