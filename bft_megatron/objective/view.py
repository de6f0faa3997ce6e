"""The geometry of a micro-batch, and what an objective sees of it, whatever the layout of rows and ranks.

`Geometry` holds the samples' edges and the supervised positions of padded or packed rows, whole or split over context
parallelism; `View` is what it shows to an objective. Masking, the bookkeeping of samples and every collective over
context parallelism are here; weights and losses are in records.py and loss.py. A sample's tokens are split as Megatron
splits them: in 2*cp chunks, of which rank r holds chunks r and 2*cp - 1 - r (`zigzag`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
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
        ValueError: a length cannot be split.
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
    """The geometry of a micro-batch: the samples' edges and the supervised positions.

    Every context-parallel rank has all labels, so counts need no communication. The index work runs on the device of
    `labels`: keep them on the CPU, so that no GPU has to be waited for.

    labels: [N] int64, whole rows flattened row by row, already shifted (position i holds token i + 1), IGNORE_INDEX
        where not supervised.
    cu_seqlens: [B+1] int, the samples' edges, covering all N positions: the multiples of s for a padded batch; for a
        packed row the edges of its samples, and its tail as a last sample without labels.
    counted: [B] bool, False for a segment that is no sample (the tail, a filler row) and has no labels.
    weight: [B] fp32, the weight that the data give each sample.
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
        """Return the number of context-parallel ranks."""
        return 1 if self.cp_group is None else dist.get_world_size(self.cp_group)

    @cached_property
    def cp_rank(self) -> int:
        """Return this process's context-parallel rank."""
        return 0 if self.cp_group is None else dist.get_rank(self.cp_group)

    @cached_property
    def positions(self) -> Tensor:
        """Return the positions [N/cp] int64 that this rank holds."""
        return zigzag(self.cu_seqlens, self.cp, self.cp_rank)

    def part(self, x: Tensor) -> Tensor:
        """Return this rank's part [b, s/cp] of whole rows x [b, s]."""
        return x.flatten()[self.positions].view(len(x), -1)

    @cached_property
    def supervised(self) -> Tensor:
        """Return which of this rank's positions have a label, [N/cp] bool."""
        return self.labels[self.positions] != IGNORE_INDEX

    @cached_property
    def n(self) -> Tensor:
        """Return the number of supervised tokens of each sample over all ranks, [B] int64."""
        return torch.bincount(self._sample_at[self.labels != IGNORE_INDEX], minlength=len(self.counted))

    def take(self, x: Tensor) -> Tensor:
        """Select the supervised tokens' values [T] from x [N/cp], this rank's positions; differentiable."""
        return x[self._supervised_index.to(x.device, non_blocking=True)]

    def view(self, logp: Tensor, entropy: Tensor | None = None) -> View:
        """Return what an objective sees of logp and entropy, each [N/cp] for this rank's positions; on their device."""

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
        """Return the sample of each position, [N] int64."""
        lengths = self.cu_seqlens.long().diff()
        return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)

    @cached_property
    def _supervised_index(self) -> Tensor:
        """Return the indices of this rank's supervised tokens among its positions, [T] int64."""
        return self.supervised.nonzero()[:, 0]

    @cached_property
    def _tokens(self) -> Tensor:
        """Return the positions of this rank's supervised tokens, [T] int64."""
        return self.positions[self.supervised]

    @cached_property
    def _span(self) -> Tensor:
        """Return for each token the id of its span, which no window crosses: its chunk, or its sample with `exact`."""
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
        place = supervised.cumsum(0) - 1  # [N], the place of a supervised position among all supervised tokens
        held = [zigzag(self.cu_seqlens, self.cp, rank) for rank in range(self.cp)]
        tokens = [positions[supervised[positions]] for positions in held]
        longest = max(1, *(len(t) for t in tokens))  # at least 1: back ends differ on empty collectives
        slots = torch.empty(int(supervised.sum()), dtype=torch.int64, device=self.labels.device)
        for rank, t in enumerate(tokens):
            slots[place[t]] = rank * longest + torch.arange(len(t), device=self.labels.device)
        return _Gather(slots, place[self._tokens], longest)


@dataclass(frozen=True, eq=False)
class View:
    """This rank's supervised tokens as an objective sees them, detached, with helpers that hide the layout.

    `x` below is [T], a value for each token. Every rank of the context-parallel group must make the same calls in the
    same order, even a rank without supervised tokens.
    """

    logp: Tensor
    """[T] fp32"""
    sample: Tensor
    """[T] int64, ids in [0, B), non-decreasing"""
    n: Tensor
    """[B] int64, the number of supervised tokens of each sample over all context-parallel ranks"""
    weight: Tensor
    """[B] fp32, the weight that the data give each sample; `objective_sum` applies it"""
    entropy: Tensor | None
    """[T] fp32 in nats; None unless the objective needs it"""
    _span: Tensor = field(repr=False)
    _group: dist.ProcessGroup | None = field(repr=False)
    _gather: _Gather | None = field(repr=False)
    _found: dict[Hashable, Tensor] = field(default_factory=dict, repr=False)

    def once(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """Return the result of `compute`, which only the first call with this key runs.

        Collectives: those of `compute`, on the first call with the key.
        """
        if key not in self._found:
            self._found[key] = compute()
        return self._found[key]

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over each sample's tokens on all ranks, [B] fp64.

        One SUM all-reduce [B] over context parallelism.
        """
        total = torch.zeros(len(self.n), dtype=torch.float64, device=x.device).index_add_(0, self.sample, x.double())
        if self._group is not None:
            dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self._group)
        return total

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over each sample's tokens on all ranks, [B] fp64; 0 without tokens. Collectives: as `sum`."""
        return self.sum(x) / self.n.clamp(min=1)

    def min(self, x: Tensor) -> Tensor:
        """Return the minimum over each sample's tokens on all ranks, [B] fp64; +inf without tokens.

        One MIN all-reduce [B] over context parallelism.
        """
        low = torch.full((len(self.n),), math.inf, dtype=torch.float64, device=x.device)
        low.scatter_reduce_(0, self.sample, x.double(), "amin")
        if self._group is not None:
            dist.all_reduce(low, op=dist.ReduceOp.MIN, group=self._group)
        return low

    def windows(self, x: Tensor, g: int) -> Tensor:
        """Return for each token t the mean of the g supervised values of its sample that end at t, [T] fp64.

        The mean is +inf where fewer than g values end at t. Positions without a label are skipped. x must be finite.
        Under context parallelism, "per_rank" windows do not cross the edge of one of the sample's 2*cp chunks and need
        no collective; "exact" windows are those of one process, and x is all-gathered in its own dtype.
        """
        if self._gather is None:
            return _trailing_means(x, self._span, g)
        return _trailing_means(self._gather(x, self._group), self._span, g)[self._gather.mine]


@dataclass(frozen=True, eq=False)
class _Gather:
    """An all-gather that puts the tokens of all context-parallel ranks into sequence order."""

    slots: Tensor  # [T of all ranks] the index of each token of the sequence in the gathered [cp * longest]
    mine: Tensor  # [T] the indices of this rank's tokens in the sequence
    longest: int  # the largest T of any rank; the others pad to it

    def __call__(self, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """Gather x [T] -> [T of all ranks] in sequence order. One all-gather [longest] over `group`."""
        padded = torch.nn.functional.pad(x, (0, self.longest - len(x)))
        everyone = x.new_empty(dist.get_world_size(group) * self.longest)
        dist.all_gather_into_tensor(everyone, padded, group=group)
        return everyone[self.slots]


def _trailing_means(x: Tensor, span: Tensor, g: int) -> Tensor:
    """Return for each t the mean of the g values of its span that end at t, or +inf, [T] fp64.

    span is [T] and non-decreasing. The prefix sums are fp64: in fp32 a sample's numbers would depend on its place in a
    packed row.
    """
    means = torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
    if len(x) >= g:
        prefix = torch.nn.functional.pad(x.double().cumsum(0), (1, 0))
        whole = span[g - 1 :] == span[: len(x) - g + 1]
        means[g - 1 :] = torch.where(whole, (prefix[g:] - prefix[:-g]) / g, math.inf)
    return means
