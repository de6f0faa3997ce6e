"""Log-probabilities of the labels from hidden states and the output layer's weight, without the logits.

Logits are computed one tile at a time, some rows by some columns of the vocabulary, in one scratch buffer. The forward
pass keeps only statistics of each row; the backward pass computes each tile again. Rows without a label are skipped.
The arithmetic is in sums.py, shared with logprobs.py. The only thing of Megatron's used here is the weight's
`main_grad`.

Rows are the outer loop: the gradient of the hidden states is finished for one chunk of rows, in fp32, before the next
chunk begins; the gradient of the weight adds up over the chunks, also in fp32. Besides inputs and gradients, the
working memory is the tile, a chunk of rows ([chunk_size, h], again in fp32 if the hidden states are not fp32, and once
more if rows are left out) and a few numbers a row. A bf16 weight without `main_grad` also takes an fp32 copy of its
gradient if there are several chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from bft_megatron.objective.sums import (
    TORCH,
    Kernels,
    Statistics,
    Sums,
    merge,
    merge_ranks,
    no_sums,
    outcome,
    shard_labels,
    softmax_scale,
)
from bft_megatron.objective.supervised_rows import SupervisedRows

TILE_BYTES = 16 << 20
"""Size of the scratch buffer for a tile of logits on a CPU: it fits the third-level cache."""
DEVICE_TILE_BYTES = 256 << 20
"""The same on a GPU, where it is larger: each tile adds a product to the whole chunk's gradient."""
ROWS = 8192
"""Rows of a chunk: enough that reading and writing the whole weight gradient once a chunk costs little."""
CPU_PRODUCT_ROWS = 1024
"""Rows at a time of a bf16 product that is added to an fp32 sum on a CPU."""


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
    """Return log p of the targets, [s, b] fp32; see `vocab_parallel_linear_statistics`."""
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
    kernels: Kernels = TORCH,
) -> Statistics:
    """Return log p of the targets under hidden @ weight^T, whether each is the argmax, and the entropy if asked for.

    Args:
        hidden: [s, b, h], the same on every rank of `group`; with `sequence_parallel` this rank's part, [s/tp, b, h].
        weight: [v/tp, h], of hidden's dtype: this rank's equal share of the vocabulary.
        targets: [s, b] int64, as in `vocab_parallel_statistics`. The index work runs on their device: keep them on the
            CPU, so that no GPU has to be waited for.
        group: the tensor-parallel group; None for an unsharded vocabulary.
        chunk_size: rows of a tile, which has as many columns as fit into TILE_BYTES (DEVICE_TILE_BYTES on a GPU).
        vocab_size: as in `vocab_parallel_statistics`.
        entropy: also return the entropy of each labelled row.
        fuse_main_grad: Megatron's gradient accumulation fusion: if the weight has a `main_grad`, add its gradient
            there, set the weight's `grad_added_to_main_grad`, and return a placeholder to autograd.
        kernels: as in `vocab_parallel_statistics`.

    Collectives over `group`, for the n rows with a label (none if n is 0): forward, all-reduces MAX [n] fp32 and SUM
    [2, n] fp64 ([3, n] with the entropy); backward, an all-reduce [n, h] of the gradient of the hidden states. With
    `sequence_parallel`, where m is the largest number of labelled rows of any rank: an all-gather [m, h] a rank in both
    passes, and in the backward pass a reduce-scatter [tp*m, h] instead of the all-reduce.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    shards = dist.get_world_size(group) if group is not None and sequence_parallel else 1
    if hidden.dtype != weight.dtype or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(f"hidden {hidden.dtype} {list(hidden.shape)} and weight {weight.dtype} {list(weight.shape)}")
    if hidden.shape[0] * shards != targets.shape[0] or hidden.shape[1] != targets.shape[1]:
        raise ValueError(f"hidden {list(hidden.shape)} on {shards} ranks and targets {list(targets.shape)}")
    options = _Options(group, chunk_size, shards > 1, vocab_size, entropy, fuse_main_grad, kernels)
    return Statistics(*_LinearStatistics.apply(hidden, weight, targets, options))


@dataclass(frozen=True)
class _Options:
    group: dist.ProcessGroup | None
    chunk_size: int
    sequence_parallel: bool
    vocab_size: int | None
    entropy: bool
    fuse_main_grad: bool
    kernels: Kernels


class _LinearStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        supervised = SupervisedRows.of(targets, hidden.device, options.group, options.sequence_parallel)
        label = shard_labels(supervised.label, weight.shape[0], options.group, options.vocab_size)
        shard = no_sums(supervised.n, hidden.device, options.entropy)
        if supervised.n:
            pool, w = supervised.pool(hidden.detach()), weight.detach()[: label.columns]
            for rows in _chunks(supervised.n, options.chunk_size):
                for columns, z in _tiles(supervised.take(pool, rows), w):
                    tile, scratch = label.tile(rows, columns), z.dtype == _FP32 and options.kernels.numerators
                    part = options.kernels.sums(z, tile, entropy=options.entropy, keep_numerators=scratch)
                    _merge_into(shard, part, rows)
        whole = merge_ranks(shard, options.group) if supervised.n else shard
        found = outcome(whole, label.supervised)
        scale = softmax_scale(shard, whole, found.log2_total)
        ctx.save_for_backward(hidden, weight, shard.shift.float(), scale, found.miss)
        # The parameter itself is kept: a saved tensor comes back without the attributes that Megatron sets on it, and
        # `main_grad` may be replaced before the backward pass.
        ctx.supervised, ctx.label, ctx.options, ctx.parameter = supervised, label, options, weight
        correct = supervised.spread(found.correct, targets.shape)
        entropy = None if found.entropy is None else supervised.spread(found.entropy, targets.shape)
        ctx.mark_non_differentiable(*(x for x in (correct, entropy) if x is not None))
        return supervised.spread(found.logp, targets.shape), correct, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, shift, scale, miss = ctx.saved_tensors
        supervised, label, options = ctx.supervised, ctx.label, ctx.options
        upstream = supervised.pick(grad.reshape(-1)).float()
        chunks = _chunks(supervised.n, options.chunk_size)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        d_pool = supervised.empty_pool(hidden) if needs_hidden else None
        d_weight = _WeightGradient(ctx.parameter, len(chunks), options.fuse_main_grad) if needs_weight else None
        if supervised.n:
            pool, w = supervised.pool(hidden.detach()), weight.detach()[: label.columns]
        for rows in chunks:
            x, up = supervised.take(pool, rows), upstream[rows]
            d_x = None if d_pool is None else _accumulator(d_pool, rows, supervised)
            for columns, z in _tiles(x, w):
                tile = label.tile(rows, columns)
                options.kernels.gradient(z, z, tile, shift[rows], -up * scale[rows], up * miss[rows] * tile.owned)
                z = z.to(x.dtype)
                if d_x is not None:
                    _add_product(d_x, z, w[columns])
                if d_weight is not None:
                    _add_product(d_weight.total[columns], z.t(), x)
            if d_pool is not None and d_x is not None and not _adds_up_in(d_pool, supervised):
                supervised.put(d_pool, rows, d_x)
        return (
            None if d_pool is None else supervised.unpool(d_pool, hidden),
            None if d_weight is None else d_weight.result(),
            None,
            None,
        )


_FP32 = torch.float32


def _chunks(n: int, chunk_size: int) -> list[slice]:
    """Split n rows into equal chunks of at most chunk_size."""
    size = max(1, -(-n // -(-n // chunk_size))) if n else 1
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _tiles(x: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of columns and their logits x [r, h] @ weight [columns, h]^T; all tiles share one storage.

    The logits have x's dtype on the CPU. On an accelerator they are fp32, which avoids a rounding to bf16.
    """
    dtype, budget = (x.dtype, TILE_BYTES) if x.device.type == "cpu" else (_FP32, DEVICE_TILE_BYTES)
    width = max(1, min(len(weight), budget // (dtype.itemsize * len(x))))
    scratch = x.new_empty(len(x) * width, dtype=dtype)
    for first in range(0, len(weight), width):
        columns = slice(first, min(first + width, len(weight)))
        size = columns.stop - columns.start
        z = scratch[: len(x) * size].view(len(x), size)
        _product(x, weight[columns].t(), z)
        yield columns, z


def _adds_up_in(pool: Tensor, supervised: SupervisedRows) -> bool:
    """Return whether a chunk's gradient adds up in the pool itself: it is fp32 and has no other rows."""
    return pool.dtype == _FP32 and supervised.place is None


def _accumulator(pool: Tensor, rows: slice, supervised: SupervisedRows) -> Tensor:
    """Return zeros [r, h] fp32: the pool's own rows if the gradient adds up there, else a new tensor."""
    if _adds_up_in(pool, supervised):
        return pool[rows]
    return pool.new_zeros(rows.stop - rows.start, pool.shape[1], dtype=_FP32)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Compute out = a @ b in out's dtype; only accelerators accept an out with more digits than a."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to total; on a CPU a bf16 product is rounded to bf16 first, for want of another kernel."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cpu":
        for some, rows in zip(total.split(CPU_PRODUCT_ROWS), a.split(CPU_PRODUCT_ROWS), strict=True):
            some.add_(torch.mm(rows, b))
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _merge_into(shard: Sums, part: Sums, rows: slice) -> None:
    """Merge a tile's sums into those rows of the shard's sums, in place."""

    def some(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[rows]

    mine = Sums(shard.top[rows], shard.others[rows], shard.label_logit[rows], some(shard.weighted))
    both = merge(mine, part)
    for name in ("top", "others", "label_logit", "weighted"):
        if getattr(both, name) is not None:
            getattr(mine, name).copy_(getattr(both, name))


class _WeightGradient:
    """The accumulator of the weight's gradient: `total` [v/tp, h] is Megatron's `main_grad` or a tensor of our own.

    Our own has the weight's dtype if each element is written once, else fp32. Vocabulary padding stays 0.
    """

    def __init__(self, weight: Tensor, chunks: int, fuse: bool) -> None:
        self.weight = weight
        self.fused = fuse and hasattr(weight, "main_grad")
        dtype = weight.dtype if chunks <= 1 else _FP32
        self.total: Tensor
        if self.fused:
            self.total = weight.main_grad  # type: ignore[attr-defined]  # Megatron keeps its buffer on the parameter
        else:
            self.total = torch.zeros_like(weight, dtype=dtype)

    def result(self) -> Tensor | None:
        """Return the gradient for autograd: without one, Megatron's overlapped reduction would never start."""
        if not self.fused:
            return self.total.to(self.weight.dtype)
        if not hasattr(self.weight, "grad_added_to_main_grad"):
            return None
        self.weight.grad_added_to_main_grad = True
        # For a tied weight Megatron adds the placeholder to `main_grad`, so it must be zeros.
        make = torch.zeros_like if getattr(self.weight, "zero_out_wgrad", False) else torch.empty_like
        return make(self.weight)
