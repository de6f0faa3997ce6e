"""Log-probabilities of the labels from logits whose vocabulary is sharded over tensor parallelism.

The logits belong to the caller, who may let them be overwritten. The arithmetic is in sums.py; linear_logprobs.py
computes the same without logits. Weights, samples, means and divisors are in view.py, records.py and loss.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from bft_megatron.objective.sums import (
    TORCH,
    Kernels,
    Statistics,
    merge_ranks,
    outcome,
    shard_labels,
    softmax_scale,
)


def vocab_parallel_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    overwrite: bool = False,
) -> Tensor:
    """Return log p of the targets, [s, b] fp32. Arguments and collectives: see `vocab_parallel_statistics`."""
    return vocab_parallel_statistics(logits, targets, group=group, vocab_size=vocab_size, overwrite=overwrite).logp


def vocab_parallel_statistics(
    logits: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    overwrite: bool = False,
    entropy: bool = False,
    kernels: Kernels = TORCH,
) -> Statistics:
    """Return log p of the targets, whether each is the argmax, and the entropy if asked for.

    Args:
        logits: [s, b, v/tp] fp32, bf16 or fp16, this rank's equal share of the vocabulary; the leading shape is free.
        targets: [s, b] int64, ids in the whole vocabulary, the same on every rank; IGNORE_INDEX where there is no
            label. Ids outside [0, vocab_size) give meaningless numbers: a check would have to wait for the GPU.
        group: the tensor-parallel group; None for an unsharded vocabulary.
        vocab_size: the true vocabulary; columns at or past it are padding and are ignored. None: no padding.
        overwrite: let the logits be overwritten (contiguous, read by nothing else). fp32 logits then hold the
            softmax's numerators after the forward pass, and logits of any dtype hold their own gradient after the
            backward pass. A second backward pass raises RuntimeError. Without `overwrite` the logits are only read
            and the gradient is a new tensor.
        entropy: also return the entropy of each labelled row.
        kernels: the implementation of the arithmetic; `triton_tiles.TRITON` on a GPU.

    Collectives over `group`: two all-reduces in the forward pass, MAX [s*b] fp32 and SUM [2, s*b] fp64 ([3, s*b] with
    the entropy); none in the backward pass.
    """
    overwrite = overwrite and torch.is_grad_enabled() and logits.requires_grad
    return Statistics(*_Statistics.apply(logits, targets, group, vocab_size, overwrite, entropy, kernels))


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        group: dist.ProcessGroup | None,
        vocab_size: int | None,
        overwrite: bool,
        entropy: bool,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        rows = _as_rows(logits, overwrite)
        label = shard_labels(targets.reshape(-1), rows.shape[1], group, vocab_size)
        keep_numerators = overwrite and logits.dtype == torch.float32 and kernels.numerators
        shard = kernels.sums(rows[:, : label.columns], label, entropy=entropy, keep_numerators=keep_numerators)
        whole = merge_ranks(shard, group)
        found = outcome(whole, label.supervised)
        ctx.save_for_backward(logits, shard.shift.float(), softmax_scale(shard, whole, found.log2_total), found.miss)
        ctx.label, ctx.kernels, ctx.overwrite, ctx.has_numerators = label, kernels, overwrite, keep_numerators
        ctx.spent = False
        correct = found.correct.view(targets.shape)
        entropies = None if found.entropy is None else found.entropy.view(targets.shape)
        ctx.mark_non_differentiable(*(x for x in (correct, entropies) if x is not None))
        return found.logp.view(targets.shape), correct, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("a second backward pass through logits that the first one overwrote with their gradient")
        ctx.spent = ctx.overwrite
        logits, shift, scale, miss = ctx.saved_tensors
        out = logits.detach() if ctx.overwrite else torch.empty_like(logits, memory_format=torch.contiguous_format)
        rows_out, columns = out.view(-1, out.shape[-1]), ctx.label.columns
        rows_out[:, columns:] = 0
        upstream = torch.where(ctx.label.supervised, grad.reshape(-1).float(), 0.0)
        if columns:
            rows = _as_rows(logits, ctx.overwrite)[:, :columns]
            at_label, at_others = upstream * miss * ctx.label.owned, -upstream * scale
            numerators_shift = None if ctx.has_numerators else shift
            ctx.kernels.gradient(rows, rows_out[:, :columns], ctx.label, numerators_shift, at_others, at_label)
        return out, None, None, None, None, None, None


def _as_rows(logits: Tensor, overwrite: bool) -> Tensor:
    """Flatten [..., v] -> [n, v]; with `overwrite` by `view`, which raises where it would have to copy."""
    flat = logits.detach()
    return flat.view(-1, flat.shape[-1]) if overwrite else flat.reshape(-1, flat.shape[-1])
