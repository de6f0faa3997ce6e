"""Running a benchmark in real processes: a gloo world with one thread per rank."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def in_processes(n: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `fn(*args)` in n forked processes, the ranks of a gloo world, one thread each; return the results by rank.

    Raises:
        RuntimeError: a process ended without a result.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(n)]
        ranks = [
            context.Process(target=_rank, args=(rank, n, Path(folder) / "store", pipes[rank][1], fn, args))
            for rank in range(n)
        ]
        for rank in ranks:
            rank.start()
        for _, sender in pipes:
            sender.close()
        try:
            return [receiver.recv() for receiver, _ in pipes]
        except EOFError:
            raise RuntimeError("a process of the benchmark failed; its traceback is above") from None
        finally:
            for rank in ranks:
                rank.join()


def _rank(rank: int, n: int, store: Path, pipe: Any, fn: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", store=dist.FileStore(str(store), n), rank=rank, world_size=n)
    pipe.send(fn(*args))
    if dist.is_initialized():  # Megatron's loop destroys it itself
        dist.destroy_process_group()
