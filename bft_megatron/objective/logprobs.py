"""Log-probabilities of the labels from logits whose vocabulary is sharded over tensor parallelism.

The only code that reads logits of size v. Weights, samples, means and divisors live in view.py, records.py and loss.py.

Why it is built as it is: on a CPU exp2 is several times cheaper than exp, and touching fresh memory costs more than the
arithmetic. So e^x is written 2^(x log2 e - k) with an *integer* k per row, which makes the shift one fused multiply-add
with one rounding and every later rescaling between shards an exact power of two; rows are worked through in blocks that
stay in the cache; and nothing of size v is allocated where the caller allows its logits to be overwritten. The label's
own numerator
is kept out of the sum: with the others' sum alone, 1 - p and log p keep all their digits where p is nearly 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from bft_megatron.objective import IGNORE_INDEX

LOG2E = torch.tensor(math.log2(math.e), dtype=torch.float32).item()
"""log2 e as the fp32 multiply-add uses it; LN2 is its exact counterpart, so that the rounding cancels in log p."""
LN2 = 1.0 / LOG2E

CPU_BLOCK_BYTES = 1 << 20
"""fp32 scratch of a block of rows: about an L2 cache."""
DEVICE_BLOCK_BYTES = 64 << 20
"""The same on an accelerator: as much as makes the launch of a block's handful of kernels cheap."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """What one pass over the vocabulary tells of the labels; the same bits on every tensor-parallel rank.

    logp: [s, b] fp32, log p of the label with its gradient, 0 where there is no label.
    correct: [s, b] bool, the label has the largest logit (ties count), False where there is no label.
    """

    logp: Tensor
    correct: Tensor


def vocab_parallel_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    overwrite: bool = False,
) -> Tensor:
    """Return log p of the targets, [s, b] fp32. Arguments, collectives and errors as in `vocab_parallel_statistics`."""
    return vocab_parallel_statistics(logits, targets, group=group, vocab_size=vocab_size, overwrite=overwrite).logp


def vocab_parallel_statistics(
    logits: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    overwrite: bool = False,
) -> Statistics:
    """Return log p of the targets and whether they are the argmax.

    Args:
        logits: [s, b, v/tp] fp32, bf16 or fp16, this rank's equal share of the vocabulary; the leading shape is free.
        targets: [s, b] int64, ids in the whole vocabulary, the same on every rank; IGNORE_INDEX (-100) has no label. An
            id outside [0, vocab_size) is the caller's error and gives meaningless numbers: to look would stall a GPU.
        group: the tensor-parallel group, None for an unsharded vocabulary.
        vocab_size: the true vocabulary; columns at or past it are padding and take no part. None: there is none.
        overwrite: the caller gives up the logits (contiguous, read by nothing else). fp32 logits then hold the
            softmax's numerators after the forward pass, and logits of any dtype hold their own gradient after the
            backward pass. A second backward pass raises RuntimeError. Without it, the logits are only read and the
            gradient is new.

    Collectives: in the forward pass two all-reduces over `group`, MAX [s*b] fp32 and SUM [2, s*b] fp64; backward, none.
    """
    overwrite = overwrite and torch.is_grad_enabled() and logits.requires_grad
    return Statistics(*_Statistics.apply(logits, targets, group, vocab_size, overwrite))


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        group: dist.ProcessGroup | None,
        vocab_size: int | None,
        overwrite: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = _as_rows(logits, overwrite)
        label = _own_labels(targets, rows.shape[1], group, vocab_size)
        keep_numerators = overwrite and logits.dtype == torch.float32
        shard = _shard_sums(rows[:, : label.columns], label, keep_numerators)
        whole = _combine(shard, group)
        log2_label = whole.label_logit * LOG2E - whole.shift
        log_odds = (whole.log2_others - log2_label) * LN2  # ln((1 - p) / p)
        # What turns numerators, which are relative to the shard's own shift, into the softmax.
        log2_scale = shard.shift - whole.shift - torch.logaddexp2(whole.log2_others, log2_label)
        ctx.save_for_backward(logits, shard.shift.float(), log2_scale.exp2().float(), log_odds.sigmoid().float())
        ctx.label, ctx.overwrite, ctx.has_numerators, ctx.spent = label, overwrite, keep_numerators, False
        logp = torch.where(label.valid, torch.nn.functional.logsigmoid(-log_odds), 0.0).float()
        correct = label.valid & (whole.label_logit >= whole.top)
        ctx.mark_non_differentiable(correct)
        return logp.view(targets.shape), correct.view(targets.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        if ctx.spent:
            raise RuntimeError("a second backward pass through logits that the first one overwrote with their gradient")
        ctx.spent = ctx.overwrite
        logits, shift, scale, miss = ctx.saved_tensors
        out = logits.detach() if ctx.overwrite else torch.empty_like(logits, memory_format=torch.contiguous_format)
        rows_out, columns = out.view(-1, out.shape[-1]), ctx.label.columns
        rows_out[:, columns:] = 0
        upstream = torch.where(ctx.label.valid, grad.reshape(-1).float(), 0.0)
        if columns:
            rows = _as_rows(logits, ctx.overwrite)[:, :columns]
            at_label, at_others = upstream * miss * ctx.label.owned, -upstream * scale
            numerators_shift = None if ctx.has_numerators else shift
            _gradient(rows, rows_out[:, :columns], ctx.label, numerators_shift, at_others, at_label)
        return out, None, None, None, None


@dataclass(frozen=True)
class _Labels:
    """The targets as this shard sees them, n = s*b rows. `column` is 0 where the label is not `owned` by this shard."""

    valid: Tensor  # [n] bool
    owned: Tensor  # [n] bool
    not_owned: Tensor  # [n] fp32, 0 where owned, else 1
    column: Tensor  # [n] int64
    columns: int  # of this shard, without vocabulary padding


@dataclass(frozen=True)
class _Sums:
    """Row statistics, [n], of one shard or of the whole vocabulary; sum of e^x = 2^(shift + log2_others) +
    e^label_logit."""

    top: Tensor  # fp32, the largest logit
    shift: Tensor  # fp64, k = ceil(top * log2 e)
    log2_others: Tensor  # fp64, of the numerators' sum without the label's
    label_logit: Tensor  # fp64, 0 where another shard owns the label


def _as_rows(logits: Tensor, overwrite: bool) -> Tensor:
    """[..., v] -> [n, v]. `view` where the storage must be the caller's: it refuses to copy."""
    flat = logits.detach()
    return flat.view(-1, flat.shape[-1]) if overwrite else flat.reshape(-1, flat.shape[-1])


def _own_labels(targets: Tensor, width: int, group: dist.ProcessGroup | None, vocab_size: int | None) -> _Labels:
    first = width * dist.get_rank(group) if group is not None else 0
    columns = width if vocab_size is None else max(0, min(width, vocab_size - first))
    label = targets.reshape(-1)
    valid = label != IGNORE_INDEX
    column = label - first
    owned = valid & (column >= 0) & (column < columns)
    return _Labels(valid, owned, (~owned).float(), torch.where(owned, column, 0), columns)


def _rows_per_block(rows: Tensor) -> int:
    budget = CPU_BLOCK_BYTES if rows.device.type == "cpu" else DEVICE_BLOCK_BYTES
    return max(1, budget // (4 * rows.shape[1]))


def _blocks(rows: Tensor, valid: Tensor) -> Iterator[tuple[slice, bool]]:
    """Blocks of rows, each with whether any of its rows has a label.

    On an accelerator every block counts as having one: to know better would wait for the device.
    """
    n, step = len(rows), _rows_per_block(rows)
    starts = range(0, n, step)
    live = [True] * len(starts)
    if rows.device.type == "cpu":
        padded = torch.nn.functional.pad(valid, (0, len(starts) * step - n))
        live = padded.view(-1, step).any(1).tolist()
    for start, has_label in zip(starts, live, strict=True):
        yield slice(start, min(start + step, n)), has_label


def _scratch(rows: Tensor) -> Tensor:
    """One fp32 block, to be used by all blocks in turn."""
    return rows.new_empty(min(len(rows), _rows_per_block(rows)), rows.shape[1], dtype=torch.float32)


def _shift(top: Tensor) -> Tensor:
    return (top * LOG2E).ceil()


def _others_(x: Tensor, shift: Tensor, label: _Labels, block: slice) -> Tensor:
    """x [r, columns] fp32 logits of a block, shift [r] -> numerators 2^(x log2 e - shift), 0 at the label, in place."""
    torch.add(-shift[:, None], x, alpha=LOG2E, out=x).exp2_()
    column = label.column[block, None]
    return x.scatter_(1, column, x.gather(1, column) * label.not_owned[block, None])


def _shard_sums(rows: Tensor, label: _Labels, keep_numerators: bool) -> _Sums:
    """rows [n, columns] -> this shard's sums. With `keep_numerators` the rows (fp32) end up holding them."""
    n = rows.shape[0]
    # A row without a label is skipped: any finite numbers do. A shard of padding alone adds nothing to any row.
    top = rows.new_full((n,), 0.0 if label.columns else -math.inf, dtype=torch.float32)
    others = rows.new_full((n,), 1.0 if label.columns else 0.0, dtype=torch.float32)
    label_logit = torch.zeros_like(top)
    if label.columns:
        label_logit = torch.where(label.owned, rows.gather(1, label.column[:, None])[:, 0].float(), 0.0)
        scratch = None if keep_numerators else _scratch(rows)
        for block, has_label in _blocks(rows, label.valid):
            if has_label:
                x = rows[block] if scratch is None else scratch[: block.stop - block.start].copy_(rows[block])
                torch.amax(x, -1, out=top[block])
                torch.sum(_others_(x, _shift(top[block]), label, block), -1, out=others[block])
    return _Sums(top, _shift(top).double(), others.double().log2(), label_logit.double())


def _combine(shard: _Sums, group: dist.ProcessGroup | None) -> _Sums:
    """This shard's sums -> the whole vocabulary's. Two all-reduces over `group`: MAX [n] fp32, SUM [2, n] fp64."""
    if group is None or dist.get_world_size(group) == 1:
        return shard
    top = shard.top.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    shift = _shift(top).double()
    both = torch.stack((torch.exp2(shard.shift - shift + shard.log2_others), shard.label_logit))
    dist.all_reduce(both, op=dist.ReduceOp.SUM, group=group)
    return _Sums(top, shift, both[0].log2(), both[1])


def _gradient(
    rows: Tensor, out: Tensor, label: _Labels, shift: Tensor | None, at_others: Tensor, at_label: Tensor
) -> None:
    """Write the gradient [n, columns] into `out`, maybe the rows' own storage, rounded once to its dtype.

    rows: logits, or, where shift is None, the numerators that the forward pass left. shift [n] fp32.
    at_others: [n] fp32, what turns a numerator into a gradient; at_label: [n] fp32, the label's gradient, 0 where not
        owned.
    """
    scratch = None if out.dtype == torch.float32 else _scratch(rows)
    for block, has_label in _blocks(rows, label.valid):
        if not has_label:
            out[block] = 0
            continue
        x = out[block] if scratch is None else scratch[: block.stop - block.start]
        if shift is not None:
            _others_(x.copy_(rows[block]), shift[block], label, block)
        x.mul_(at_others[block, None]).scatter_add_(1, label.column[block, None], at_label[block, None])
        if scratch is not None:
            out[block] = x
