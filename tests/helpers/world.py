"""Real processes for tests: fork a gloo world from the pytest process, which has imported torch and Megatron once."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist


def run_world(n: int, fn: Callable[..., Any], *args: Any, timeout: float = 240, megatron: bool = False) -> list[Any]:
    """Call `fn(*args)` in n forked processes, each a rank of one gloo world, and return what they return, by rank.

    With `megatron` the CPU backend is installed in them first. A rank that raises fails the call with its traceback and
    ends the others; so does running past `timeout` seconds. The calling process never holds a process group.
    """
    gc.freeze()  # what is imported is not looked through again, in each child, at every collection
    with tempfile.TemporaryDirectory() as folder:
        pids = [_fork(rank, n, Path(folder), fn, args, megatron) for rank in range(n)]
        failed = _wait(pids, timeout)
        errors = [p.read_text() for p in sorted(Path(folder).glob("*.error"))]
        assert not errors, "\n".join(errors)
        assert not failed, failed
        return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(n)]


def _fork(rank: int, n: int, folder: Path, fn: Callable[..., Any], args: tuple[Any, ...], megatron: bool) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank))
        if megatron:
            from bft_megatron.upstream import cuda_on_cpu

            cuda_on_cpu.install()
        store = dist.FileStore(str(folder / "store"), n)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=n, timeout=timedelta(seconds=60))
        (folder / f"{rank}.result").write_bytes(pickle.dumps(fn(*args)))
        if dist.is_initialized():
            dist.destroy_process_group()
        status = 0
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        status = 1
    os._exit(status)


def _wait(pids: list[int], timeout: float) -> str:
    """Wait for all; at the first failure or at the time limit end the rest. Returns what went wrong, or nothing."""
    deadline, left, failed = time.monotonic() + timeout, set(pids), ""
    while left:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                left.discard(pid)
                if status and not failed:
                    failed = f"rank {pids.index(pid)} ended with status {os.waitstatus_to_exitcode(status)}"
        if left and (failed or time.monotonic() > deadline):
            failed = failed or f"ranks {[pids.index(p) for p in left]} still ran after {timeout} s"
            time.sleep(0.2)  # let the others write their own tracebacks
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return failed
