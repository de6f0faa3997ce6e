"""A synchronous checkpoint save without a helper process."""

from __future__ import annotations

import queue

from bft_megatron.upstream.change import Change

RESULTS = Change(
    "megatron.core.dist_checkpointing.strategies.filesystem_async:_results_queue",
    "replaced",
    "A synchronous save needs no queue between processes. Megatron's queue is held by a multiprocessing manager for "
    "each rank, which imports the main module again, takes seconds and 723 MB, outlives a killed rank, and is ended by "
    "the signal that requests a save.",
    "a synchronous save uses a plain queue",
    "tests/upstream/test_checkpoints.py",
)


def without_helper_process() -> None:
    """Give the synchronous writer a plain queue. Call it before the first save, which would start the manager."""
    RESULTS.put(queue.Queue())
