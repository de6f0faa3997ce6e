"""The heads that benchmarks/head.py compares: log p of the labels from logits, or from hidden states and weight.

They are ours, Megatron's two cross entropies, the method's definition, and two libraries that avoid the logits. Each
returns log p [s, b], with its gradient, and 0 without a label; BFT's loss computed from it is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor

from bft_megatron.labels import IGNORE_INDEX
from bft_megatron.objective.linear_logprobs import vocab_parallel_linear_statistics
from bft_megatron.objective.logprobs import vocab_parallel_logprobs

OverLogits = Callable[[Tensor, Tensor], Tensor]
"""logits [s, b, v/tp], targets [s, b] -> log p."""
FromHidden = Callable[[Tensor, Tensor, Tensor], Tensor]
"""hidden [s, b, h], weight [v/tp, h], targets [s, b] -> log p."""

BASELINE = "Megatron, unfused"


def definition(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute log p as the method's definition and its authors' code do, for an unsharded vocabulary.

    The loss comes from one log-softmax in fp32, its weights from a second, detached one.
    """
    logits = logits.float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    with torch.no_grad():
        logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])
    return -loss.view(targets.shape)


def megatron_unfused(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute Megatron's default, its unfused vocab-parallel cross entropy."""
    loss = vocab_parallel_cross_entropy(logits, targets.clamp(min=0), tp_group=dist.group.WORLD)
    return -loss * (targets != IGNORE_INDEX)


def megatron_fused(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute Megatron's `--cross-entropy-loss-fusion`, here as eager PyTorch; its gradient is always bf16."""
    loss = fused_vocab_parallel_cross_entropy(logits, targets.clamp(min=0), dist.group.WORLD)
    return -loss * (targets != IGNORE_INDEX)


def ours_over_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute `objective.head: logits`, which overwrites the logits' storage."""
    return vocab_parallel_logprobs(logits, targets, group=dist.group.WORLD, overwrite=True)


def ours_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute `objective.head: chunked`."""
    return vocab_parallel_linear_statistics(hidden, weight, targets, group=dist.group.WORLD, fuse_main_grad=True).logp


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute Liger's scaled cross entropy in its PyTorch fallback for machines without its kernels."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import _FusedLinearPPOFallbackFunction

    loss = _FusedLinearPPOFallbackFunction.apply(
        hidden.flatten(0, 1), weight, targets.flatten(), 1.0, IGNORE_INDEX, False
    )
    return -loss.view(targets.shape)


def cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute cut-cross-entropy in its PyTorch form, which materialises the logits, so only its time is reported."""
    from cut_cross_entropy import linear_cross_entropy

    loss = linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten(), reduction="none", impl="torch_compile")
    return -loss.view(targets.shape)


def with_product(head: OverLogits) -> FromHidden:
    """Return a head over logits with Megatron's column-parallel product in front."""

    def from_hidden(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        hidden = copy_to_tensor_model_parallel_region(hidden, dist.group.WORLD)
        return head(hidden @ weight.t(), targets)

    return from_hidden


OVER_LOGITS: dict[str, OverLogits] = {
    "definition": definition,
    BASELINE: megatron_unfused,
    "Megatron, fused": megatron_fused,
    "ours, over logits": ours_over_logits,
}
FROM_HIDDEN: dict[str, FromHidden] = {
    "definition": with_product(definition),
    BASELINE: with_product(megatron_unfused),
    "ours, over logits": with_product(ours_over_logits),
    "ours, chunked": ours_chunked,
    "Liger": liger,
    "cut-cross-entropy": cut_cross_entropy,
}
PACKAGES = {"Liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}
"""The package of each head that is neither in this project nor in Megatron."""
UNSHARDED = {"definition", "Liger", "cut-cross-entropy"}
"""Heads that run only without tensor parallelism."""
TIME_ALONE = {"cut-cross-entropy"}
"""Heads whose memory here says nothing about their kernels."""
