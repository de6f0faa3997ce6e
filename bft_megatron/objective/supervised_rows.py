"""Which rows of a batch have a label, and their way between this rank's hidden states and the rows that are computed.

The index work, the gather and the reduction over tensor parallelism of the head without logits; what is computed of the
rows is in linear_logprobs.py. Both ways go through a pool [p, h] that holds the rows with a label at `place`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bft_megatron.labels import IGNORE_INDEX


@dataclass(frozen=True, eq=False)
class SupervisedRows:
    """The n rows that have a label, in sequence order, among all s*b and among those that this rank holds."""

    label: Tensor  # [n] int64
    index: Tensor  # [n] int64, among all rows
    mine: Tensor  # [m] int64, among this rank's
    place: Tensor | None  # [n] int64, in the pool; None: the pool's rows are those with a label
    counts: list[int]  # how many each rank holds; under sequence parallelism alone more than one entry
    group: dist.ProcessGroup | None
    sequence_parallel: bool

    @staticmethod
    def of(
        targets: Tensor, device: torch.device, group: dist.ProcessGroup | None, sequence_parallel: bool
    ) -> SupervisedRows:
        """targets [s, b], wherever they are -> the rows, on `device`."""
        label = targets.reshape(-1)
        supervised = label != IGNORE_INDEX
        shards = supervised.view(dist.get_world_size(group) if sequence_parallel else 1, -1)
        own = shards[dist.get_rank(group) if sequence_parallel else 0]
        index, mine = (x.nonzero()[:, 0] for x in (supervised, own))
        counts = shards.sum(1).tolist()
        place = index
        if sequence_parallel:  # each rank's rows at the front of its equal part of the pool
            offset = torch.arange(len(counts), device=index.device) * max(counts)
            order = torch.arange(shards.shape[1], device=index.device)
            first = torch.tensor(counts, device=index.device)
            place = (offset[:, None] + order)[order < first[:, None]]
        full = len(place) == (max(counts) * len(counts) if sequence_parallel else len(label))
        label, index, mine = (x.to(device, non_blocking=True) for x in (label[index], index, mine))
        place = None if full else place.to(device, non_blocking=True)
        return SupervisedRows(label, index, mine, place, counts, group, sequence_parallel)

    @property
    def n(self) -> int:
        """Rows with a label, on all ranks."""
        return sum(self.counts)

    def pick(self, x: Tensor) -> Tensor:
        """x [s*b] -> [n]."""
        return x[self.index]

    def spread(self, x: Tensor, shape: torch.Size) -> Tensor:
        """x [n] -> `shape`, of s*b elements, 0 at the other rows."""
        return x.new_zeros(shape.numel()).index_copy_(0, self.index, x).view(shape)

    def pool(self, hidden: Tensor) -> Tensor:
        """This rank's hidden states -> [p, h]: themselves, or under SP what an all-gather [longest, h] brings."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        if not self.sequence_parallel:
            return flat
        own = flat if len(self.mine) == len(flat) else flat[self.mine]
        own = torch.nn.functional.pad(own, (0, 0, 0, max(self.counts) - len(own)))
        everyone = own.new_empty(len(self.counts) * len(own), own.shape[1])
        dist.all_gather_into_tensor(everyone, own, group=self.group)
        return everyone

    def take(self, pool: Tensor, rows: slice) -> Tensor:
        """Some of the n rows, [rows, h]; a view of the pool where they lie in it as they are."""
        return pool[rows] if self.place is None else pool[self.place[rows]]

    def put(self, pool: Tensor, rows: slice, x: Tensor) -> None:
        """Write x [rows, h], of any dtype, to its rows of the pool."""
        if self.place is None:
            pool[rows].copy_(x)
        else:
            pool.index_copy_(0, self.place[rows], x.to(pool.dtype))

    def empty_pool(self, hidden: Tensor) -> Tensor:
        """Zeros [p, h] of hidden's dtype, for the hidden states' gradient."""
        p = len(self.counts) * max(self.counts) if self.sequence_parallel else hidden.numel() // hidden.shape[-1]
        return hidden.new_zeros(p, hidden.shape[-1])

    def unpool(self, gradient: Tensor, hidden: Tensor) -> Tensor:
        """gradient, a pool of this vocabulary shard -> that of this rank's hidden states.

        One collective, in their dtype as Megatron's: an all-reduce [n, h], under SP a reduce-scatter [tp*longest, h].
        """
        if not self.sequence_parallel:
            if self.n and self.group is not None and dist.get_world_size(self.group) > 1:
                own = self.take(gradient, slice(None))
                dist.all_reduce(own, group=self.group)
                self.put(gradient, slice(None), own)
            return gradient.view(hidden.shape)
        own = gradient
        if self.n:
            own = gradient.new_empty(max(self.counts), gradient.shape[1])
            dist.reduce_scatter_tensor(own, gradient, group=self.group)
            own = own[: len(self.mine)]
        if own.numel() == hidden.numel():
            return own.view(hidden.shape)
        whole = hidden.new_zeros(hidden.numel() // hidden.shape[-1], hidden.shape[-1])
        return whole.index_copy_(0, self.mine, own).view(hidden.shape)
