"""Megatron's step over tensors without values, on one rank of a simulated cluster; for `plan` only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from bft_megatron.upstream.change import Change

_UNTIL = "never: only a plan has neither values nor other ranks"
_TEST = "tests/plan/test_truth.py"
_CLIPPING = "The gradients' norm is read from values. The replacement returns 0, and nothing is scaled."


def _change(target: str, why: str, *parameters: str) -> Change:
    return Change(target, "replaced", why, _UNTIL, _TEST, parameters or None)


GATHER = _change(
    "torch.distributed:all_gather_object",
    "Gathers the parameter groups of all ranks. The replacement takes them as equal on every rank.",
    *("object_list", "obj", "group", "weights_only"),
)
EXCHANGE = _change(
    "torch.distributed:batch_isend_irecv",
    "Batched messages need the device's back end, so they are issued one by one.",
    "p2p_op_list",
)
AUTOCAST = _change("torch:is_autocast_enabled", "It does not support the meta device.")
SUCCESS = Change(
    "megatron.training.training:logical_and_across_model_parallel_group",
    "wrapped",
    "Its all-reduce runs and is counted; its result, which is read from a value, is replaced by this rank's own.",
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
EDGES = _change(
    "megatron.core.ssm.gated_delta_net.common:_GDNBase._resolve_cu_seqlens",
    "It checks the edges of a packed row's samples by their values. The replacement returns them unchecked.",
    *("self", "cu_seqlens_padded", "cu_seqlens_actual", "total_seq_len", "name", "cp_size"),
)

ROUTE = Change(
    "megatron.core.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher.preprocess",
    "wrapped",
    "It runs, with its messages. The numbers of tokens that it reads from values are replaced by equal ones.",
    _UNTIL,
    _TEST,
    ("self", "routing_map"),
)


def join(rank: int, world: int) -> None:
    """Form a process group in which this is the only rank that exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())


def install() -> None:
    """Replace the functions that read values or other ranks' objects and for which 0 is no answer."""
    GATHER.put(_own_everywhere)
    EXCHANGE.put(_one_by_one)
    AUTOCAST.put(lambda *_: False)
    SUCCESS.wrap(_own_success)
    APPLY.put(lambda op, noop_flag_buffer, tensor_lists, *args: op(0, noop_flag_buffer, tensor_lists, *args))
    SCALE.put(None)
    EDGES.put(lambda _, padded, actual, *__, **___: actual if padded is None else padded)
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


def route_evenly(load: float) -> None:
    """Have every rank send equally many tokens to each expert.

    Args:
        load: factor of the tokens that this rank's experts receive; a rank sends as many as without it.
    """

    def counting(preprocess: Callable[..., Any]) -> Callable[..., Any]:
        def counts(*args: Any, **kwargs: Any) -> Tensor:
            preprocess(*args, **kwargs)
            dispatcher, chosen = ROUTE.read(preprocess, args, kwargs).values()
            sent = chosen.shape[0] * dispatcher.config.moe_router_topk
            ranks, experts = dispatcher.ep_size, dispatcher.num_local_experts
            own_load = load if ranks * dispatcher.tp_size > 1 else 1.0  # one rank's experts receive its own tokens
            received = _equal_parts(round(sent * own_load / ranks), experts)  # of each rank, by expert
            dispatcher.input_splits = _equal_parts(sent, ranks)
            dispatcher.output_splits = [sum(received)] * ranks
            dispatcher.output_splits_tp = numpy.full(dispatcher.tp_size, sum(received) * ranks)
            grid = torch.tensor([received] * (ranks * dispatcher.tp_size))
            dispatcher.num_global_tokens_per_local_expert = grid
            return grid.sum(dim=0)

        return counts

    ROUTE.wrap(counting)


def _equal_parts(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]
