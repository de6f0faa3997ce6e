"""Saving that survives: what of Megatron's checkpoint writing has to be replaced on every device."""

from __future__ import annotations

import queue


def without_helper_process() -> None:
    """Give Megatron's synchronous writer a plain queue in place of one behind a process.

    It would start a multiprocessing manager a rank at the first save, which imports the main module again, takes
    seconds and 723 MB, outlives a killed rank, and dies of the signal that asks for a save
    (`strategies/filesystem_async.py`, 52-68). A synchronous save needs no queue that crosses processes.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()
