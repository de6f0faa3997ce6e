"""An ordered parallel map over all cores that holds few items in memory."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any

from bft_megatron import parent
from bft_megatron.errors import UserError

AHEAD = 3
"""Items in flight for each process."""


def ordered_map[Item, Result](function: Callable[[Item], Result], items: Iterator[Item]) -> Iterator[Result]:
    """Yield function(item) for each item, in order; the results do not depend on the number of processes.

    A single item is processed in this process. Otherwise worker processes are forked with the function in them, so it
    is never pickled; items and results are.

    Raises:
        UserError: a process was killed, or memory or Python's stack was not enough, here or there.
    """
    try:
        yield from _mapped(function, items)
    except (MemoryError, RecursionError) as e:
        raise UserError(unprepared(e)) from None


def unprepared(error: MemoryError | RecursionError) -> str:
    """Return why rows were not prepared, for an error."""
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    return "this machine's memory is not enough to prepare the data: lower data.max_row_bytes, or end other programs"


def _mapped[Item, Result](function: Callable[[Item], Result], items: Iterator[Item]) -> Iterator[Result]:
    cores = len(os.sched_getaffinity(0))
    first = list(islice(items, 2))
    if len(first) < 2 or cores == 1:
        yield from map(function, chain(first, items))
        return
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(cores, context, initializer=_begin, initargs=(function, os.getpid()))
    waiting: deque[Future[Result]] = deque()
    try:
        for item in chain(first, items):
            waiting.append(pool.submit(_call, item))
            if len(waiting) >= AHEAD * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError("a process that prepares the data was killed, most likely for want of memory") from None
    finally:
        pool.shutdown(cancel_futures=True)


_function: Callable[[Any], Any] | None = None  # set in a forked process, which serves a single map


def _begin(function: Callable[[Any], Any], starter: int) -> None:
    """Initialise a worker: it ends when the parent does, even if that is killed, and leaves signals to it."""
    global _function
    _function = function
    parent.end_with_it()
    if os.getppid() != starter:
        os._exit(1)
    gc.freeze()  # keeps the collector away from the forked objects, so their pages are not copied
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the pool ends the others once one is killed
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


def _call(item: Any) -> Any:
    assert _function is not None
    return _function(item)
