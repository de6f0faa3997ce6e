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


def mind_padding_between_buckets() -> None:
    """Have the optimizer's state saved for the parameter that it belongs to where gradients are reduced in buckets.

    For the format that any layout can load, Megatron gathers the state without the padding at the buckets' ends, then
    looks for each parameter at its place with that padding (`distrib_optimizer.py`, `get_parameter_state_dp_zero`,
    `sharded_param_state_fully_reshardable`): behind the first bucket that is padded, master weights and moments of
    other parameters are saved, without an error. One bucket (no `overlap-grad-reduce`) or sizes that need no padding
    are right.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer as Optimizer

    if getattr(Optimizer, "_minds_padding_between_buckets", False):
        return
    Optimizer._minds_padding_between_buckets = True
    reshardable, gather = Optimizer.sharded_param_state_fully_reshardable, Optimizer.get_parameter_state_dp_zero

    def reshardable_with_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.get_parameter_state_dp_zero = lambda **options: _with_padding(self.buffers, gather(self, **options))
        try:
            return reshardable(self, *args, **kwargs)
        finally:
            del self.get_parameter_state_dp_zero

    Optimizer.sharded_param_state_fully_reshardable = reshardable_with_padding


def _with_padding(buffers: list[Any], state: dict[Any, Any] | None) -> dict[Any, Any] | None:
    """Each buffer's tensors, without padding between its buckets -> at the places that its parameters have in it."""
    for i, buffer in enumerate(buffers if state else []):
        for tensors in state[i].values():
            for key in tensors.keys() - {"numel_unpadded"}:
                parts = tensors[key].split([bucket.numel_unpadded for bucket in buffer.buckets])
                tensors[key] = tensors[key].new_zeros(buffer.numel)
                for bucket, part in zip(buffer.buckets, parts, strict=True):
                    tensors[key][bucket.offset : bucket.offset + len(part)] = part
    return state


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
