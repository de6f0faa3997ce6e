"""Ranks of a job on this machine's GPUs: several on one card, their collectives staged, or one on each over NCCL."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.hub import find_model
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.folder import RunFolder
from bft_megatron.run.prepared import prepare_rows
from tests.gpu import staged
from tests.helpers.runs import Result, do_nothing, gradients, read_metrics, train_rank


def run_on_card(made: Recipe) -> Result:
    """Run a recipe on this machine's first GPU, and read what it left."""
    return run_on_cards(made, 1, shared=False)


def run_on_cards(made: Recipe, world: int, *, shared: bool) -> Result:
    """Run a recipe on `world` ranks, which share the first card or have one each, and read what it left."""
    folder, model = RunFolder.of(made), find_model(made.model)
    prepared = prepare_rows(made, model, read_config(model).vocab_size)
    before = staged.take_over if shared else do_nothing
    call(world, shared, train_rank, made, prepared, before)
    return Result(*read_metrics(folder.metrics), gradients(folder.checkpoints / "iter_0000001", made))


def call(world: int, shared: bool, fn: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
    """Call `fn(*args)` in `world` spawned processes, each a rank, and return what they return, by rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("spawn")  # a fork cannot claim a GPU that its parent has
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, mp_context=context)) for _ in range(world)]
        futures = [pool.submit(_rank, rank, world, port, shared, fn, args) for rank, pool in enumerate(pools)]
        return [future.result(timeout) for future in futures]


def _rank(rank: int, world: int, port: int, shared: bool, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    os.environ["LOCAL_RANK"] = "0" if shared else str(rank)
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # as the launcher sets it
    multiprocessing.set_start_method("fork", force=True)  # for the workers of data loaders, as outside of tests
    return fn(*args)
