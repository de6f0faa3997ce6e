"""The optimizer's state, saved for the parameter that it belongs to where gradients are reduced in buckets.

For the format that any layout can load, Megatron gathers the state without the padding at the buckets' ends, then looks
for each parameter at its place with that padding: behind the first bucket that is padded, master weights and moments of
other parameters are saved, without an error. One bucket (no `overlap-grad-reduce`) or sizes that need no padding are
right.

Megatron's own cure (pull request #5077) takes the padding out of the places; ours puts it back into the tensors. Both
together would correct twice, so the method is tried first on a buffer of two parameters, and left alone where it is
right.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bft_megatron.upstream.change import Change

_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
_UNTIL = (
    "a release with [pull request #5077](https://github.com/NVIDIA/Megatron-LM/pull/5077); on such a release nothing "
    "is changed, which a trial of the method decides at every start"
)
_TEST = "tests/upstream/test_bucket_padding.py"

SHARDED_STATE = Change(
    f"{_OPTIMIZER}.sharded_param_state_fully_reshardable",
    "wrapped",
    "Behind a padded gradient bucket the state of other parameters is saved, silently.",
    _UNTIL,
    _TEST,
    ("self",),
)
GATHERED_STATE = Change(
    f"{_OPTIMIZER}.get_parameter_state_dp_zero",
    "wrapped",
    "What it gathers gets the padding back. Of the one optimizer, while its state is collected.",
    _UNTIL,
    _TEST,
    (),
)


def mend() -> None:
    """Have each parameter's own state saved; changes nothing where Megatron does that already.

    Raises:
        RuntimeError: the trial cannot tell. No checkpoint must be written until it is known what this release saves.
    """
    try:
        right = saves_each_its_own()
    except Exception as e:
        raise RuntimeError(f"cannot tell whether this Megatron saves the right state: {SHARDED_STATE.target}") from e
    if not right:
        SHARDED_STATE.wrap(_with_padded_tensors)


def saves_each_its_own() -> bool:
    """Whether the method finds the state of a parameter behind a padded bucket. On the CPU, without collectives."""
    trial = _Trial()
    shards = trial.method({"0": _shard("0", trial.first), "1": _shard("1", trial.second)}, metadata={})
    found = [shards[i]["param"].data.tolist() for i in range(2)]
    return found == [trial.first.tolist(), trial.second.tolist()]


class _Trial:
    """As much of a `DistributedOptimizer` as its method reads: two parameters, the first in a bucket padded by one."""

    def __init__(self) -> None:
        self.first, self.second = (torch.nn.Parameter(torch.full((3,), x)) for x in (1.0, 2.0))
        places = {self.first: (0, 3, 0), self.second: (4, 7, 1)}  # start, end, bucket
        buckets = [SimpleNamespace(offset=4 * i, numel_unpadded=3 + i, grad_data=torch.zeros(4)) for i in range(2)]
        self.buffers = [SimpleNamespace(numel=8, numel_unpadded=7, buckets=buckets, param_index_map=places)]
        self.gbuf_ranges = [{"fp32": [{"param_map": {self.first: None}}, {"param_map": {self.second: None}}]}]

    def method(self, state: dict[str, Any], **options: Any) -> dict[int, Any]:
        return SHARDED_STATE.owner.sharded_param_state_fully_reshardable(self, state, **options)

    def get_parameter_state_dp_zero(self, **_: Any) -> dict[Any, Any]:
        tensors = {"param": torch.cat((self.first, self.second, torch.zeros(1))).detach(), "numel_unpadded": 7}
        return {"buckets_coalesced": True, 0: {"fp32": tensors}}


def _shard(key: str, parameter: Tensor) -> Any:
    from megatron.core.dist_checkpointing import ShardedTensor

    return ShardedTensor.from_rank_offsets(key, parameter)


def _with_padded_tensors(method: Callable[..., Any]) -> Callable[..., Any]:
    def with_padded_tensors(*args: Any, **kwargs: Any) -> Any:
        optimizer = SHARDED_STATE.read(method, args, kwargs)["self"]
        gather = optimizer.get_parameter_state_dp_zero
        GATHERED_STATE.put(lambda **options: _padded(optimizer.buffers, gather(**options)), on=optimizer)
        try:
            return method(*args, **kwargs)
        finally:
            del optimizer.get_parameter_state_dp_zero  # the class's own again

    return with_padded_tensors


def _padded(buffers: list[Any], state: dict[Any, Any] | None) -> dict[Any, Any] | None:
    """Each buffer's tensors, without padding between its buckets -> at the places that its parameters have in it."""
    if not state:
        return state
    for i, buffer in enumerate(buffers):
        for tensors in state[i].values():
            for key in tensors.keys() - {"numel_unpadded"}:
                parts = tensors[key].split([bucket.numel_unpadded for bucket in buffer.buckets])
                tensors[key] = tensors[key].new_zeros(buffer.numel)
                for bucket, part in zip(buffer.buckets, parts, strict=True):
                    tensors[key][bucket.offset : bucket.offset + len(part)] = part
    return state
