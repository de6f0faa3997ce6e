"""The geometry of a micro-batch, and what an objective sees of it, whatever the layout of rows and ranks.

`Geometry` holds the samples' edges and the supervised positions of padded or packed rows, whole or split over context
parallelism; `View` is what it shows to an objective. Masking, the bookkeeping of samples and every collective over
context parallelism are here; weights and losses are in records.py and loss.py. A sample's tokens are split as Megatron
splits them: in 2*cp chunks, of which rank r holds chunks r and 2*cp - 1 - r (`zigzag`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from bft_megatron.labels import IGNORE_INDEX


def zigzag(cu_seqlens: Tensor, cp: int, rank: int) -> Tensor:
    """Return the positions [N/cp] int64 that a context-parallel rank holds, in the order in which it holds them.

    Args:
        cu_seqlens: [B+1] int, the edges of the samples; every length must be a multiple of 2*cp unless cp is 1.

    Raises:
        ValueError: where a length cannot be split.
    """
    edges = cu_seqlens.long()
    lengths = edges.diff()
    if cp == 1:
        return torch.arange(int(edges[-1]), device=edges.device)
    if (lengths % (2 * cp)).any():
        raise ValueError(f"every sample's padded length must be a multiple of 2 * cp = {2 * cp}: {lengths.tolist()}")
    sample = torch.arange(len(lengths), device=edges.device).repeat_interleave(lengths // cp)
    start, chunk = edges[sample], (lengths // (2 * cp))[sample]
    offset = torch.arange(len(sample), device=edges.device) - start // cp
    skipped = torch.where(offset < chunk, rank, 2 * cp - 2 - rank)  # chunks of other ranks before this one
    return start + skipped * chunk + offset


@dataclass(frozen=True, eq=False)
class Geometry:
    """The geometry of a micro-batch: which positions are supervised, and whose.

    All of it follows from the labels, which every context-parallel rank has in full: counts need no communication. The
    index work runs where `labels` are; keep them on the CPU, and a GPU is never waited for.

    labels: [N] int64, whole rows flattened row by row, already shifted (position i holds token i + 1), IGNORE_INDEX
        where not supervised.
    cu_seqlens: [B+1] int, the samples' edges, covering all N positions: a padded batch has multiples of s, a packed row
        its samples and, as a last one without labels, its tail.
    counted: [B] bool, False for what is no sample (the tail, a filler row); it has no labels.
    weight: [B] fp32, the data's own weight of each sample.
    cp_group: the context-parallel group; None for no split.
    cp_windows: whether windows stay within a chunk ("per_rank") or run over the whole sample ("exact").
    """

    labels: Tensor
    cu_seqlens: Tensor
    counted: Tensor
    weight: Tensor
    cp_group: dist.ProcessGroup | None = None
    cp_windows: Literal["per_rank", "exact"] = "per_rank"

    @cached_property
    def cp(self) -> int:
        """The number of context-parallel ranks."""
        return 1 if self.cp_group is None else dist.get_world_size(self.cp_group)

    @cached_property
    def cp_rank(self) -> int:
        """This process's rank among them."""
        return 0 if self.cp_group is None else dist.get_rank(self.cp_group)

    @cached_property
    def positions(self) -> Tensor:
        """[N/cp] int64: the positions that this rank holds."""
        return zigzag(self.cu_seqlens, self.cp, self.cp_rank)

    @cached_property
    def supervised(self) -> Tensor:
        """[N/cp] bool: which of this rank's positions have a label."""
        return self.labels[self.positions] != IGNORE_INDEX

    @cached_property
    def n(self) -> Tensor:
        """[B] int64: supervised tokens of each sample, over all ranks."""
        return torch.bincount(self._sample_at[self.labels != IGNORE_INDEX], minlength=len(self.counted))

    def take(self, x: Tensor) -> Tensor:
        """x [N/cp], for each of this rank's positions -> [T], those of its supervised tokens; passes gradients."""
        return x[self._supervised_index.to(x.device, non_blocking=True)]

    def view(self, logp: Tensor, entropy: Tensor | None = None) -> View:
        """logp, entropy: [N/cp] for each of this rank's positions -> what an objective sees, on their device."""

        def to(x: Tensor) -> Tensor:
            return x.to(logp.device, non_blocking=True)

        gather = self._gather
        return View(
            logp=self.take(logp.detach()),
            sample=to(self._sample_at[self._tokens]),
            n=to(self.n),
            weight=to(self.weight),
            entropy=None if entropy is None else self.take(entropy.detach()),
            _span=to(self._span),
            _group=self.cp_group if self.cp > 1 else None,
            _gather=None if gather is None else _Gather(to(gather.slots), to(gather.mine), gather.longest),
        )

    @cached_property
    def _sample_at(self) -> Tensor:
        """[N] int64: the sample of each position."""
        lengths = self.cu_seqlens.long().diff()
        return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)

    @cached_property
    def _supervised_index(self) -> Tensor:
        """[T] int64: where this rank's supervised tokens lie among its positions."""
        return self.supervised.nonzero()[:, 0]

    @cached_property
    def _tokens(self) -> Tensor:
        """[T] int64: the positions of this rank's supervised tokens."""
        return self.positions[self.supervised]

    @cached_property
    def _span(self) -> Tensor:
        """What a window may not leave, an id for each token it runs over: the chunk, or with `exact` the sample."""
        if self._gather is not None:
            return self._sample_at[self.labels != IGNORE_INDEX]
        sample = self._sample_at[self._tokens]
        edges = self.cu_seqlens.long()
        chunk = (edges.diff() // (2 * self.cp if self.cp > 1 else 1))[sample]
        return sample * 2 * self.cp + (self._tokens - edges[sample]) // chunk

    @cached_property
    def _gather(self) -> _Gather | None:
        if self.cp == 1 or self.cp_windows == "per_rank":
            return None
        supervised = self.labels != IGNORE_INDEX
        place = supervised.cumsum(0) - 1  # [N], a supervised position's place among all supervised tokens of the rows
        held = [zigzag(self.cu_seqlens, self.cp, rank) for rank in range(self.cp)]
        tokens = [positions[supervised[positions]] for positions in held]
        longest = max(1, *(len(t) for t in tokens))  # never an empty collective, whatever the back end makes of one
        slots = torch.empty(int(supervised.sum()), dtype=torch.int64, device=self.labels.device)
        for rank, t in enumerate(tokens):
            slots[place[t]] = rank * longest + torch.arange(len(t), device=self.labels.device)
        return _Gather(slots, place[self._tokens], longest)


@dataclass(frozen=True, eq=False)
class View:
    """What an objective sees: this rank's supervised tokens, detached, and helpers that hide all layout from it.

    `x` below is [T], a value for each token. Every rank of the context-parallel group must make the same calls in the
    same order, one without a supervised token too.
    """

    logp: Tensor
    """[T] fp32"""
    sample: Tensor
    """[T] int64, ids in [0, B), non-decreasing"""
    n: Tensor
    """[B] int64, supervised tokens of each sample, over all context-parallel ranks"""
    weight: Tensor
    """[B] fp32, the data's own weight of each sample; the step applies it"""
    entropy: Tensor | None
    """[T] fp32, where the objective needs it"""
    _span: Tensor = field(repr=False)
    _group: dist.ProcessGroup | None = field(repr=False)
    _gather: _Gather | None = field(repr=False)

    def sum(self, x: Tensor) -> Tensor:
        """[B] fp64, the sum over a sample's tokens on all ranks. One SUM all-reduce [B] over context parallelism."""
        total = torch.zeros(len(self.n), dtype=torch.float64, device=x.device).index_add_(0, self.sample, x.double())
        if self._group is not None:
            dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self._group)
        return total

    def mean(self, x: Tensor) -> Tensor:
        """[B] fp64, the mean over a sample's tokens on all ranks, 0 for one without. Collectives as in `sum`."""
        return self.sum(x) / self.n.clamp(min=1)

    def min(self, x: Tensor) -> Tensor:
        """[B] fp64, the minimum on all ranks, +inf for a sample without tokens. One MIN all-reduce [B], as in `sum`."""
        low = torch.full((len(self.n),), math.inf, dtype=torch.float64, device=x.device)
        low.scatter_reduce_(0, self.sample, x.double(), "amin")
        if self._group is not None:
            dist.all_reduce(low, op=dist.ReduceOp.MIN, group=self._group)
        return low

    def windows(self, x: Tensor, g: int) -> Tensor:
        """[T] fp64, the mean of the g supervised values of one sample that end at t, +inf where there are fewer.

        Masked positions in between do not count. x must be finite. Under context parallelism either no window crosses
        the edge of one of the sample's 2*cp chunks, and there is no collective, or with `exact` windows they are those
        of one process, and x is all-gathered over context parallelism in its own dtype.
        """
        if self._gather is None:
            return _trailing_means(x, self._span, g)
        return _trailing_means(self._gather(x, self._group), self._span, g)[self._gather.mine]


@dataclass(frozen=True, eq=False)
class _Gather:
    """How the tokens of all context-parallel ranks come back into sequence order."""

    slots: Tensor  # [T of all ranks] where each token of the sequence lies in the gathered [cp * longest]
    mine: Tensor  # [T] the places of this rank's tokens in the sequence
    longest: int  # the largest T of any rank, to which all pad

    def __call__(self, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """x [T] of this rank -> [T of all ranks] in sequence order. One all-gather [longest] over `group`."""
        padded = torch.nn.functional.pad(x, (0, self.longest - len(x)))
        everyone = x.new_empty(dist.get_world_size(group) * self.longest)
        dist.all_gather_into_tensor(everyone, padded, group=group)
        return everyone[self.slots]


def _trailing_means(x: Tensor, span: Tensor, g: int) -> Tensor:
    """x [T], span [T] non-decreasing -> [T] fp64, the mean of the g values of one span that end at t, or +inf.

    By prefix sums, in fp64 always: in fp32 they would make a sample's numbers depend on its place in a packed row.
    """
    means = torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
    if len(x) >= g:
        prefix = torch.nn.functional.pad(x.double().cumsum(0), (1, 0))
        whole = span[g - 1 :] == span[: len(x) - g + 1]
        means[g - 1 :] = torch.where(whole, (prefix[g:] - prefix[:-g]) / g, math.inf)
    return means
