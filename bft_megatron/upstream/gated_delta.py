"""The kernels of Megatron's gated delta net, which are flash-linear-attention's, and the dtypes of its parameters."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from bft_megatron.upstream.change import Change
from bft_megatron.upstream.cuda_on_cpu import gpu_is_visible

_NET = "megatron.core.ssm.gated_delta_net"
_UNTIL = "Megatron's gated delta net runs packed rows without flash-linear-attention"
_TEST = "tests/layers/test_delta_rule.py"

HAVE_FLA = Change(
    f"{_NET}.common:HAVE_FLA",
    "replaced",
    "Without flash-linear-attention the layer refuses to be built. Its kernels need a GPU, and on a CPU it can be "
    "imported all the same.",
    _UNTIL,
    _TEST,
)
L2NORM = Change(f"{_NET}.common:l2norm", "replaced", "The norm of query and key is such a kernel.", _UNTIL, _TEST)
CONVOLUTION = Change(f"{_NET}.gdn:causal_conv1d", "replaced", "The convolution is such a kernel.", _UNTIL, _TEST)
RULE = Change(
    f"{_NET}.gdn:chunk_gated_delta_rule",
    "replaced",
    "The gated delta rule is such a kernel. Megatron's own in torch takes no packed rows, and its sums of the decay "
    "lose digits in fp32.",
    _UNTIL,
    _TEST,
)
GROUP_RANGES = Change(
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._build_optimizer_group_ranges",
    "wrapped",
    "In a 16-bit model with some fp32 parameters, the parameters of a group are numbered as their buffers come, but "
    "the optimizer has the fp32 ones first: a save takes one parameter's state for another's, or fails on its size.",
    "Megatron numbers the parameters of a group in the optimizer's order",
    "tests/checkpoint/test_hybrids.py",
    ("param_groups", "gbuf_ranges"),
)


def fla_is_used() -> bool:
    """Return whether flash-linear-attention computes gated delta nets: on a GPU, if it is installed."""
    return gpu_is_visible() and importlib.util.find_spec("fla") is not None


def use_where_missing(l2norm: Callable[..., Any], convolution: Callable[..., Any], rule: Callable[..., Any]) -> None:
    """Have gated delta nets call these functions, unless flash-linear-attention computes them."""
    if not fla_is_used():
        use(l2norm, convolution, rule)


def use(l2norm: Callable[..., Any], convolution: Callable[..., Any], rule: Callable[..., Any]) -> None:
    """Have gated delta nets that are built from here on call these functions."""
    HAVE_FLA.put(True)
    L2NORM.put(l2norm)
    CONVOLUTION.put(convolution)
    RULE.put(rule)


def install() -> None:
    """Have the distributed optimizer number fp32 parameters before 16-bit ones."""
    build = GROUP_RANGES.owner._build_optimizer_group_ranges.__func__

    def ordered(cls: Any, param_groups: Any, gbuf_ranges: Any) -> Any:
        return build(cls, param_groups, sorted(gbuf_ranges, key=_is_16_bit))

    GROUP_RANGES.put(classmethod(ordered))


def _is_16_bit(buffer: dict[tuple[torch.dtype, torch.dtype], Any]) -> bool:
    """Return whether a buffer, keyed by the dtypes of its parameters and gradients, has 16-bit parameters alone."""
    return all(parameters != torch.float32 for parameters, _ in buffer)
