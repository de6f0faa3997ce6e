"""Megatron's step on one rank of a cluster that is not there, over tensors without values; for `plan` alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from bft_megatron.upstream.change import Change

_UNTIL = "never: only a plan has neither values nor other ranks"
_TEST = "tests/plan/test_truth.py"
_CLIPPING = "The gradients' norm would be read from values; here it is 0, and nothing is scaled."


def _change(target: str, why: str, *parameters: str) -> Change:
    return Change(target, "replaced", why, _UNTIL, _TEST, parameters or None)


GATHER = _change(
    "torch.distributed:all_gather_object",
    "Which parameter groups there are: on every rank the same.",
    *("object_list", "obj", "group", "weights_only"),
)
EXCHANGE = _change(
    "torch.distributed:batch_isend_irecv", "Messages together would ask for the device's back end.", "p2p_op_list"
)
AUTOCAST = _change("torch:is_autocast_enabled", "The meta device is not among those it knows.")
SUCCESS = Change(
    "megatron.training.training:logical_and_across_model_parallel_group",
    "wrapped",
    "Its all-reduce is counted, and its answer, read from a value, is this rank's own.",
    _UNTIL,
    _TEST,
    ("input",),
)
APPLY = _change(
    "megatron.core.optimizer.clip_grads:multi_tensor_applier",
    _CLIPPING,
    *("op", "noop_flag_buffer", "tensor_lists", "args"),
)
SCALE = _change("megatron.core.optimizer.clip_grads:multi_tensor_scale_tensor_impl", _CLIPPING)
NORM = _change(
    "megatron.core.optimizer.clip_grads:l2_norm_impl",
    _CLIPPING,
    *("chunk_size", "noop_flag", "tensor_lists", "per_tensor", "args"),
)


def join(rank: int, world: int) -> None:
    """Form a group of which no other rank exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())


def install() -> None:
    """Replace what looks at values, or at other ranks', where it cannot be answered by a 0."""
    GATHER.put(_own_everywhere)
    EXCHANGE.put(_one_by_one)
    AUTOCAST.put(lambda *_: False)
    SUCCESS.wrap(_own_success)
    APPLY.put(lambda op, noop_flag_buffer, tensor_lists, *args: op(0, noop_flag_buffer, tensor_lists, *args))
    SCALE.put(None)
    NORM.put(lambda chunk_size, noop_flag, tensor_lists, *_: (tensor_lists[0][0].new_zeros(1), None))


def _own_everywhere(
    object_list: list[Any], obj: Any, group: dist.ProcessGroup | None = None, weights_only: bool = False
) -> None:
    object_list[:] = [obj] * len(object_list)


def _one_by_one(p2p_op_list: list[dist.P2POp]) -> list[Any]:
    return [m.op(m.tensor, m.peer, group=m.group, tag=m.tag) for m in p2p_op_list]


def _own_success(reduce: Callable[..., bool]) -> Callable[..., bool]:
    def own(*args: Any, **kwargs: Any) -> bool:
        reduce(*args, **kwargs)
        return SUCCESS.read(reduce, args, kwargs)["input"]

    return own
