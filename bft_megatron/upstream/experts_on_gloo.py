"""The exchange of tokens between experts on gloo, which takes sizes as numbers and equal parts alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bft_megatron.upstream.change import Change

_TEST = "tests/upstream/test_experts_on_gloo.py"
_MAPPINGS = "megatron.core.tensor_parallel.mappings"

COUNTS = Change(
    "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
    "replaced",
    "Megatron turns the numbers of tokens of a GPU into a numpy array and leaves a tensor of the CPU as it is; gloo's "
    "`all_to_all_single` takes numbers.",
    "a tensor of the CPU becomes an array too",
    _TEST,
    ("tensor", "as_numpy", "record_stream"),
)
GATHER = Change(
    f"{_MAPPINGS}:_gather_along_first_dim",
    "wrapped",
    "With expert-tensor parallelism the ranks of a group hold different numbers of tokens. Gloo gathers equal parts "
    "alone.",
    "gloo's all_gather takes parts of different sizes",
    _TEST,
    ("input_", "group", "output_split_sizes"),
)
REDUCE_SCATTER = Change(
    f"{_MAPPINGS}:_reduce_scatter_along_first_dim",
    "wrapped",
    "As for the gather, of which it is the backward pass.",
    "gloo's reduce_scatter takes parts of different sizes",
    _TEST,
    ("input_", "group", "input_split_sizes"),
)


def install() -> None:
    """Have Megatron's dispatcher of tokens to experts work on gloo."""
    COUNTS.put(_on_the_cpu)
    GATHER.wrap(_gathering)
    REDUCE_SCATTER.wrap(_reduce_scattering)


def _on_the_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


def _gathering(even: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def gather(*args: Any, **kwargs: Any) -> Tensor:
        x, group, sizes = GATHER.read(even, args, kwargs).values()
        if sizes is None or group.size() == 1:
            return even(*args, **kwargs)
        most = _most(sizes)
        out = x.new_empty(most * group.size(), *x.shape[1:])
        dist.all_gather_into_tensor(out, _padded(x, most), group=group)
        return torch.cat([part[:n] for part, n in zip(out.split(most), sizes, strict=True)])

    return gather


def _reduce_scattering(even: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduce_scatter(*args: Any, **kwargs: Any) -> Tensor:
        x, group, sizes = REDUCE_SCATTER.read(even, args, kwargs).values()
        if sizes is None or group.size() == 1:
            return even(*args, **kwargs)
        most = _most(sizes)
        out = x.new_empty(most, *x.shape[1:])
        dist.reduce_scatter_tensor(out, torch.cat([_padded(part, most) for part in x.split(list(sizes))]), group=group)
        return out[: sizes[group.rank()]].contiguous()

    return reduce_scatter


def _most(sizes: Any) -> int:
    return max(*map(int, sizes), 1)  # no token may have come for an expert, and no collective takes no rows


def _padded(x: Tensor, rows: int) -> Tensor:
    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])
