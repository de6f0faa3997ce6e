"""How Megatron saves: what of its checkpoint writing has to be replaced, on every device, and who hears of a save."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import Any


def without_helper_process() -> None:
    """Give Megatron's synchronous writer a plain queue in place of one behind a process.

    It would start a multiprocessing manager a rank at the first save, which imports the main module again, takes
    seconds and 723 MB, outlives a killed rank, and dies of the signal that asks for a save
    (`strategies/filesystem_async.py`, 52-68). A synchronous save needs no queue that crosses processes.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()


def after_each_save(hear: Callable[[int, float], None]) -> None:
    """Have `hear(iteration, seconds)` called on every rank after each save of Megatron's training loop."""
    from megatron.training import training

    save = training.save_checkpoint_and_time

    def save_and_tell(iteration: int, *args: Any, **kwargs: Any) -> Any:
        start = time.monotonic()
        result = save(iteration, *args, **kwargs)
        hear(iteration, time.monotonic() - start)
        return result

    training.save_checkpoint_and_time = save_and_tell
