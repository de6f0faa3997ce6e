"""The arithmetic of a softmax over a vocabulary in parts, which are tiles of columns or tensor-parallel shards.

Here are the statistics of a part's rows, how those of two parts are merged, and log p, entropy and gradient from them.
logprobs.py and linear_logprobs.py make the logits, keep them or compute them again.

Reasons for the form: on a CPU exp2 is several times cheaper than exp, and touching new memory costs more than the
arithmetic. So e^x is written as 2^(x log2 e - k) with an *integer* k per row: the shift is one fused multiply-add with
one rounding, and every later rescaling between parts is an exact power of two. Rows are processed in blocks that stay
in the cache, and nothing of size v is allocated. The label's own numerator is left out of the sum: 1 - p and log p come
from the sum of the others and keep all their digits where p is nearly 1. Quantities with one number a row are fp64,
which costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bft_megatron.labels import IGNORE_INDEX

LOG2E = torch.tensor(math.log2(math.e), dtype=torch.float32).item()
"""log2 e rounded to fp32, as the multiply-add uses it. LN2 is its reciprocal, so that the rounding cancels in log p."""
LN2 = 1.0 / LOG2E

LOWEST = -1e30
"""The largest logit of a part without columns: below every real logit, and finite, so that nothing becomes NaN."""

CPU_BLOCK_BYTES = 4 << 20
"""fp32 scratch of a block of rows: it fits the third-level cache; smaller blocks cost more in calls than they save."""
DEVICE_BLOCK_BYTES = 64 << 20
"""The same on an accelerator: large enough that launching a block's kernels costs little."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of the labels from one pass over the vocabulary; the same bits on every tensor-parallel rank.

    logp: [s, b] fp32, log p of the label with its gradient, 0 where there is no label.
    correct: [s, b] bool, whether the label has the largest logit (ties count); False where there is no label.
    entropy: [s, b] fp32 in nats, the entropy of the distribution, detached, 0 where there is no label; None if it was
        not asked for.
    """

    logp: Tensor
    correct: Tensor
    entropy: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of n rows relative to a part of the vocabulary; `column` is 0 where the part does not own one."""

    supervised: Tensor  # [n] bool
    owned: Tensor  # [n] bool
    column: Tensor  # [n] int64
    columns: int  # columns of the part, without vocabulary padding

    def tile(self, rows: slice, columns: slice) -> Labels:
        """Return the labels of some rows relative to some of the columns, counted from 0 again."""
        supervised, column = self.supervised[rows], self.column[rows] - columns.start
        width = columns.stop - columns.start
        owned = self.owned[rows] & (column >= 0) & (column < width)
        return Labels(supervised, owned, torch.where(owned, column, 0), width)


def shard_labels(label: Tensor, width: int, group: dist.ProcessGroup | None, vocab_size: int | None) -> Labels:
    """Return the labels, [n] int64 ids in the whole vocabulary, relative to this rank's `width` columns."""
    first = width * dist.get_rank(group) if group is not None else 0
    columns = width if vocab_size is None else max(0, min(width, vocab_size - first))
    supervised = label != IGNORE_INDEX
    column = label - first
    owned = supervised & (column >= 0) & (column < columns)
    return Labels(supervised, owned, torch.where(owned, column, 0), columns)


@dataclass(frozen=True, eq=False)
class Sums:
    """Statistics [n] of rows over a part of the vocabulary or all of it.

    With k = ceil(top * log2 e) and y = x log2 e - k, the sum of e^x is 2^k others + e^label_logit.
    """

    top: Tensor  # fp32, the largest logit except the label's
    others: Tensor  # fp64, the sum of 2^y without the label's
    label_logit: Tensor  # fp64, the label's logit, 0 where another part owns it
    weighted: Tensor | None  # fp64, the sum of y 2^y without the label's, for the entropy

    @property
    def shift(self) -> Tensor:
        """Return k, [n] fp64."""
        return _shift(self.top).double()

    def under(self, top: Tensor) -> Sums:
        """Return the same sums relative to the k of another row maximum [n], which must not be smaller."""
        step = self.shift - _shift(top).double()
        scale = step.exp2()
        weighted = None if self.weighted is None else scale * (self.weighted + step * self.others)
        return Sums(top, scale * self.others, self.label_logit, weighted)


def no_sums(n: int, device: torch.device, entropy: bool) -> Sums:
    """Return the sums of a part without columns, each in its own storage."""
    others, label_logit, weighted = torch.zeros(3, n, dtype=torch.float64, device=device)
    top = torch.full((n,), LOWEST, dtype=torch.float32, device=device)
    return Sums(top, others, label_logit, weighted if entropy else None)


def merge(a: Sums, b: Sums) -> Sums:
    """Return the sums over two parts."""
    top = torch.maximum(a.top, b.top)
    a, b = a.under(top), b.under(top)
    weighted = None if a.weighted is None or b.weighted is None else a.weighted + b.weighted
    return Sums(top, a.others + b.others, a.label_logit + b.label_logit, weighted)


def merge_ranks(shard: Sums, group: dist.ProcessGroup | None) -> Sums:
    """Merge the sums of all shards of the vocabulary.

    Two all-reduces over `group`: MAX [n] fp32 and SUM [2, n] fp64 ([3, n] with the entropy).
    """
    if group is None or dist.get_world_size(group) == 1:
        return shard
    top = shard.top.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    mine = shard.under(top)
    parts = [mine.others, mine.label_logit] + ([] if mine.weighted is None else [mine.weighted])
    total = torch.stack(parts)
    dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
    return Sums(top, total[0], total[1], None if mine.weighted is None else total[2])


@dataclass(frozen=True, eq=False)
class Outcome:
    """The results of each row, [n] fp32, from the whole vocabulary's sums; 0 or False for rows without a label."""

    logp: Tensor
    correct: Tensor
    entropy: Tensor | None
    miss: Tensor  # 1 - p
    log2_total: Tensor  # fp64, log2 of the sum of e^x, minus k


def outcome(whole: Sums, supervised: Tensor) -> Outcome:
    """Compute the results of each row from the whole vocabulary's sums and whether the row has a label, [n] bool."""
    log2_label, log2_others = whole.label_logit * LOG2E - whole.shift, whole.others.log2()
    log_odds = (log2_others - log2_label) * LN2  # ln((1 - p) / p)
    log2_total = torch.logaddexp2(log2_others, log2_label)
    logp = torch.where(supervised, torch.nn.functional.logsigmoid(-log_odds), 0.0).float()
    correct = supervised & (whole.label_logit >= whole.top)
    entropy = None
    if whole.weighted is not None:
        mean = whole.weighted * (-log2_total).exp2() + log2_label * (log2_label - log2_total).exp2()
        entropy = torch.where(supervised, (log2_total - mean) * LN2, 0.0).float()
    return Outcome(logp, correct, entropy, log_odds.sigmoid().float(), log2_total)


def softmax_scale(shard: Sums, whole: Sums, log2_total: Tensor) -> Tensor:
    """Return the factors that turn numerators relative to the shard's own k into the softmax, [n] fp32."""
    return (shard.shift - whole.shift - log2_total).exp2().float()


def sums(rows: Tensor, label: Labels, *, entropy: bool = False, keep_numerators: bool = False) -> Sums:
    """Return the sums of rows [n, columns] of logits.

    With `keep_numerators` the rows (fp32) are overwritten with the numerators 2^y, 0 at the label. Blocks in which no
    row has a label are skipped; their rows get the sums of no columns.
    """
    none = no_sums(len(rows), rows.device, entropy)
    if not label.columns or not len(rows):
        return none
    top, others = none.top[:, None], torch.zeros(len(rows), 1, device=rows.device)
    weighted = torch.zeros_like(others) if entropy else None
    column, at_column, hole = _hole(rows, label)
    held = None if keep_numerators else _scratch(rows, torch.float32 if _is_slow_to_widen(rows) else rows.dtype)
    scratch = held if rows.dtype == torch.float32 or _is_slow_to_widen(rows) else _scratch(rows)
    exponents = _scratch(rows) if entropy else None
    for block, has_label in _blocks(rows, label.supervised):
        if not has_label:
            continue
        size = block.stop - block.start
        x = rows[block] if held is None else held[:size].copy_(rows[block])
        x.scatter_(1, column[block], hole[block].to(x.dtype))
        highest = top[block].copy_(torch.amax(x, -1, keepdim=True)).clamp_(min=LOWEST)
        x = _exponents(x, _shift(highest), x if scratch is None else scratch[:size])
        if exponents is not None:  # clamped from below, so that y 2^y is 0 and not NaN for a logit of -inf
            y = torch.clamp(x, min=LOWEST, out=exponents[:size])
        torch.sum(x.exp2_(), -1, keepdim=True, out=others[block])
        if weighted is not None:
            torch.sum(y.mul_(x), -1, keepdim=True, out=weighted[block])
    label_logit = torch.where(label.owned, at_column[:, 0].double(), 0.0)
    return Sums(top[:, 0], others[:, 0].double(), label_logit, None if weighted is None else weighted[:, 0].double())


def gradient(
    rows: Tensor, out: Tensor, label: Labels, shift: Tensor | None, at_others: Tensor, at_label: Tensor
) -> None:
    """Write the gradient [n, columns] into `out`, rounded once to its dtype; `out` may share the storage of `rows`.

    rows: [n, columns], the logits, or the numerators that `sums` left if `shift` is None.
    shift: [n] fp32, the shard's k.
    at_others: [n] fp32, the factor that turns a numerator into a gradient.
    at_label: [n] fp32, the gradient of the label's logit, 0 where the part does not own it.
    """
    column, owned = label.column[:, None], label.owned[:, None]
    at_others, at_label = at_others[:, None], at_label[:, None].to(out.dtype)
    scratch = None if out.dtype == torch.float32 else _scratch(rows)
    for block, has_label in _blocks(rows, label.supervised):
        here = out[block]
        if not has_label:
            here.zero_()
            continue
        x = here if scratch is None else scratch[: block.stop - block.start]
        if shift is not None:
            _exponents(rows[block], shift[block, None], x).exp2_()
        if _is_slow_to_widen(out):
            here.copy_(x.mul_(at_others[block]))
        else:
            torch.mul(x, at_others[block], out=here)
        # The label's own numerator, which may be infinite, goes with what it was multiplied to.
        kept = torch.where(owned[block], at_label[block], here.gather(1, column[block]))
        here.scatter_(1, column[block], kept)


@dataclass(frozen=True)
class Kernels:
    """An implementation of the two passes over a part of the vocabulary.

    numerators: whether `sums` can leave the numerators in the rows; else the backward pass computes them again.
    """

    sums: Callable[..., Sums]
    gradient: Callable[..., None]
    numerators: bool


TORCH = Kernels(sums, gradient, numerators=True)
"""The functions above, in plain torch."""


def _rows_per_block(rows: Tensor) -> int:
    budget = CPU_BLOCK_BYTES if rows.device.type == "cpu" else DEVICE_BLOCK_BYTES
    return max(1, budget // (4 * rows.shape[1]))


def _blocks(rows: Tensor, supervised: Tensor) -> Iterator[tuple[slice, bool]]:
    """Yield blocks of rows, each with whether any of its rows has a label.

    On an accelerator the answer is always True: finding out would have to wait for the device.
    """
    n, step = len(rows), _rows_per_block(rows)
    starts = range(0, n, step)
    live = [True] * len(starts)
    if rows.device.type == "cpu":
        padded = torch.nn.functional.pad(supervised, (0, len(starts) * step - n))
        live = padded.view(-1, step).any(1).tolist()
    for start, has_label in zip(starts, live, strict=True):
        yield slice(start, min(start + step, n)), has_label


def _scratch(rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return one buffer, which all blocks use in turn."""
    return rows.new_empty(min(len(rows), _rows_per_block(rows)), rows.shape[1], dtype=dtype)


def _is_slow_to_widen(rows: Tensor) -> bool:
    """Return whether an operator on such rows and fp32 would convert them in new memory: on a CPU, not on a GPU."""
    return rows.device.type == "cpu" and rows.dtype != torch.float32


def _shift(top: Tensor) -> Tensor:
    return (top * LOG2E).ceil()


def _hole(rows: Tensor, label: Labels) -> tuple[Tensor, Tensor, Tensor]:
    """Return the labels' columns, the logits there and the values to overwrite them with, each [n, 1].

    The value is -inf for an owned label, whose numerator becomes 0, and the logit itself for the others.
    """
    column = label.column[:, None]
    at_column = rows.gather(1, column).float()
    return column, at_column, torch.where(label.owned[:, None], -math.inf, at_column)


def _exponents(x: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    """Write y = x log2 e - shift of logits x [r, columns] into `out`, fp32, which may be x; shift is [r, 1]."""
    if _is_slow_to_widen(x):
        x = out.copy_(x)
    return torch.add(-shift, x, alpha=LOG2E, out=out)
