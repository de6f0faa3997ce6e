"""Log-probabilities of the labels from hidden states and the output layer's weight, without the logits.

Logits exist a tile at a time, some rows by some columns of the vocabulary, in one reused scratch; the forward pass
keeps row statistics alone, the backward pass makes each tile again. Rows without a label never enter. The arithmetic is
in sums.py, shared with logprobs.py; nothing here knows of Megatron's modules, only of its `main_grad`.

Columns are the outer loop: a slice of the weight's gradient is finished before the next begins. The hidden states'
gradient adds up in fp32. Beyond inputs and gradients the working memory is the tile, the rows that count ([n, h], once
in the hidden states' dtype where some rows are left out or gathered, once in fp32 backward) and a few numbers a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from bft_megatron.objective.kept_rows import KeptRows
from bft_megatron.objective.sums import (
    Statistics,
    Sums,
    gradient,
    merge,
    merge_ranks,
    no_sums,
    outcome,
    shard_labels,
    softmax_scale,
    sums,
)

TILE_BYTES = 16 << 20
"""Of the scratch that holds a tile of logits: a CPU's third-level cache, half of a large GPU's second."""
ROWS = 8192
"""Rows of a tile, where there are as many: large, so that a slice of the weight's gradient is one product."""


def vocab_parallel_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    chunk_size: int = ROWS,
    sequence_parallel: bool = False,
    vocab_size: int | None = None,
) -> Tensor:
    """Return log p of the targets, [s, b] fp32. As `vocab_parallel_linear_statistics`."""
    return vocab_parallel_linear_statistics(
        hidden,
        weight,
        targets,
        group=group,
        chunk_size=chunk_size,
        sequence_parallel=sequence_parallel,
        vocab_size=vocab_size,
    ).logp


def vocab_parallel_linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    chunk_size: int = ROWS,
    sequence_parallel: bool = False,
    vocab_size: int | None = None,
    entropy: bool = False,
    fuse_main_grad: bool = False,
) -> Statistics:
    """Return log p of the targets under hidden @ weight^T, whether they are the argmax, and where asked the entropy.

    Args:
        hidden: [s, b, h], the same on every rank of `group`; under `sequence_parallel` [s/tp, b, h], this rank's part.
        weight: [v/tp, h], of hidden's dtype: this rank's equal share of the vocabulary.
        targets: [s, b] int64 and `vocab_size`: as in `vocab_parallel_statistics`. The index work runs where they are:
            keep them on the CPU, and a GPU is not waited for.
        group: the tensor-parallel group, None for an unsharded vocabulary.
        chunk_size: rows of a tile; as many columns as fit into TILE_BYTES go with them.
        entropy: also return the entropy of each labelled row.
        fuse_main_grad: Megatron's gradient accumulation fusion: where the weight has a `main_grad`, its gradient is
            added there, the weight says so in `grad_added_to_main_grad`, and what autograd gets is a placeholder.

    Collectives over `group`, none where no row has a label: forward, MAX [n] fp32 and SUM [2, n] fp64 (with the entropy
    [3, n]) for the n rows with a label; backward, an all-reduce [n, h] of the hidden states' gradient. Under
    `sequence_parallel`, with m the most labelled rows of any rank: forward and backward an all-gather [m, h] a rank,
    backward a reduce-scatter [tp*m, h] in place of the all-reduce.

    Raises:
        ValueError: shapes or dtypes do not go together.
    """
    shards = dist.get_world_size(group) if group is not None and sequence_parallel else 1
    if hidden.dtype != weight.dtype or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(f"hidden {hidden.dtype} {list(hidden.shape)} and weight {weight.dtype} {list(weight.shape)}")
    if hidden.shape[0] * shards != targets.shape[0] or hidden.shape[1] != targets.shape[1]:
        raise ValueError(f"hidden {list(hidden.shape)} on {shards} ranks and targets {list(targets.shape)}")
    options = _Options(group, chunk_size, shards > 1, vocab_size, entropy, fuse_main_grad)
    return Statistics(*_LinearStatistics.apply(hidden, weight, targets, options))


@dataclass(frozen=True)
class _Options:
    group: dist.ProcessGroup | None
    chunk_size: int
    sequence_parallel: bool
    vocab_size: int | None
    entropy: bool
    fuse_main_grad: bool


class _LinearStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        kept = KeptRows.of(targets, hidden.device, options.group, options.sequence_parallel)
        label = shard_labels(kept.label, weight.shape[0], options.group, options.vocab_size)
        w = weight.detach()[: label.columns]
        shard = no_sums(kept.n, hidden.device, options.entropy)
        if kept.n:
            x = kept.gather(hidden.detach())
            for rows, columns, z in _tiles(x, w, options.chunk_size):
                part = sums(z, label.tile(rows, columns), entropy=options.entropy, keep_numerators=z.dtype == _FP32)
                _merge_into(shard, part, rows)
            whole = merge_ranks(shard, options.group)
        else:
            whole = shard
        found = outcome(whole, label.valid)
        scale = softmax_scale(shard, whole, found.log2_total)
        ctx.save_for_backward(hidden, weight, shard.shift.float(), scale, found.miss)
        # A saved parameter comes back without what Megatron hung on it; `main_grad` may be replaced in between.
        ctx.kept, ctx.label, ctx.options, ctx.parameter = kept, label, options, weight
        results = [
            x if x is None else kept.spread(x, targets.shape) for x in (found.logp, found.correct, found.entropy)
        ]
        ctx.mark_non_differentiable(*(x for x in results[1:] if x is not None))
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, shift, scale, miss = ctx.saved_tensors
        kept, label, options = ctx.kept, ctx.label, ctx.options
        upstream = kept.pick(grad.reshape(-1)).float()
        d_hidden = hidden.new_zeros(kept.n, hidden.shape[-1], dtype=_FP32)
        d_weight = _WeightGradient(ctx.parameter, label.columns, ctx.needs_input_grad[1], options.fuse_main_grad)
        if kept.n:
            x, w = kept.gather(hidden.detach()), weight.detach()[: label.columns]
            for rows, columns, z in _tiles(x, w, options.chunk_size):
                tile = label.tile(rows, columns)
                up = upstream[rows]
                gradient(z, z, tile, shift[rows], -up * scale[rows], up * miss[rows] * tile.owned)
                z = z.to(x.dtype)
                if ctx.needs_input_grad[0]:
                    _add_product(d_hidden[rows], z, w[columns])
                d_weight.add(columns, z, x[rows], last=rows.stop == kept.n)
        elif d_weight.whole is not None:
            d_weight.whole.zero_()
        return (
            kept.scatter(d_hidden, hidden) if ctx.needs_input_grad[0] else None,
            d_weight.result(),
            None,
            None,
        )


_FP32 = torch.float32


def _tiles(x: Tensor, weight: Tensor, chunk_size: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """x [n, h], weight [columns, h] -> rows, columns, and their logits, in storage that the next tile takes over.

    On the CPU in x's dtype, on an accelerator in fp32, whose rounding to bf16 is then not paid.
    """
    n, v = len(x), len(weight)
    dtype = x.dtype if x.device.type == "cpu" else _FP32
    height = max(1, min(n, chunk_size))
    width = max(1, min(v, TILE_BYTES // (dtype.itemsize * height)))
    scratch = x.new_empty(height * width, dtype=dtype)
    for first in range(0, v, width):
        columns = slice(first, min(first + width, v))
        for start in range(0, n, height):
            rows = slice(start, min(start + height, n))
            shape = rows.stop - rows.start, columns.stop - columns.start
            z = scratch[: shape[0] * shape[1]].view(shape)
            _product(x[rows], weight[columns].t(), z)
            yield rows, columns, z


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, in out's dtype: not rounded to a's where out has more digits (accelerators alone know this)."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; a product of bf16 is rounded to bf16 first on a CPU, which has no other."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cpu":
        total.add_(torch.mm(a, b))
    else:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))


def _merge_into(shard: Sums, part: Sums, rows: slice) -> None:
    """Add a tile's sums to those rows of the shard's, in place."""

    def some(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[rows]

    mine = Sums(shard.top[rows], shard.others[rows], shard.label_logit[rows], some(shard.weighted))
    both = merge(mine, part)
    for name in ("top", "others", "label_logit", "weighted"):
        if getattr(both, name) is not None:
            getattr(mine, name).copy_(getattr(both, name))


class _WeightGradient:
    """Where the weight's gradient [v/tp, h] adds up: Megatron's `main_grad`, or a new tensor of the weight's dtype.

    In the new tensor each slice is written once, after adding up in fp32 where several tiles of rows make it.
    """

    def __init__(self, weight: Tensor, columns: int, needed: bool, fuse: bool) -> None:
        self.weight, self.needed = weight, needed
        self.main = weight.main_grad if needed and fuse and hasattr(weight, "main_grad") else None
        self.whole = torch.empty_like(weight) if needed and self.main is None else None
        if self.whole is not None:
            self.whole[columns:] = 0  # vocabulary padding
        self.slice: Tensor | None = None

    def add(self, columns: slice, z: Tensor, x: Tensor, last: bool) -> None:
        """z [r, c], x [r, h]: add z^T x to the slice; `last`: of the tiles that make it."""
        if self.main is not None:
            _add_product(self.main[columns], z.t(), x)
        elif self.whole is not None:
            if self.slice is None and (last or self.whole.dtype == _FP32):
                torch.mm(z.t(), x, out=self.whole[columns])
                self.slice = self.whole[columns]
            else:
                if self.slice is None:
                    self.slice = torch.zeros(z.shape[1], x.shape[1], dtype=_FP32, device=x.device)
                _add_product(self.slice, z.t(), x)
            if last:
                if self.slice.dtype != self.whole.dtype:
                    self.whole[columns] = self.slice
                self.slice = None

    def result(self) -> Tensor | None:
        """What autograd gets; a gradient must come back, or Megatron's overlapped reduction never starts."""
        if self.main is None:
            return self.whole
        if not hasattr(self.weight, "grad_added_to_main_grad"):
            return None
        self.weight.grad_added_to_main_grad = True
        # Of a tied weight Megatron adds the placeholder to `main_grad` all the same.
        make = torch.zeros_like if getattr(self.weight, "zero_out_wgrad", False) else torch.empty_like
        return make(self.weight)
