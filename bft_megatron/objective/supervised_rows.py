"""The rows with a label, for the head without logits: selecting, gathering and reducing them over tensor parallelism.

linear_logprobs.py computes with the rows. Hidden states and their gradient pass through a pool [p, h], which holds the
rows with a label at the indices `place`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bft_megatron.labels import IGNORE_INDEX


@dataclass(frozen=True, eq=False)
class SupervisedRows:
    """The n rows with a label, in sequence order: their indices among all s*b rows and among those of this rank."""

    label: Tensor  # [n] int64
    index: Tensor  # [n] int64, indices among all rows
    mine: Tensor  # [m] int64, indices among this rank's rows
    place: Tensor | None  # [n] int64, indices in the pool; None: every row of the pool has a label
    counts: list[int]  # rows with a label on each rank under sequence parallelism, else one entry
    group: dist.ProcessGroup | None
    sequence_parallel: bool

    @staticmethod
    def of(
        targets: Tensor, device: torch.device, group: dist.ProcessGroup | None, sequence_parallel: bool
    ) -> SupervisedRows:
        """Find the rows with a label in targets [s, b], on the targets' device, and put the indices on `device`."""
        label = targets.reshape(-1)
        supervised = label != IGNORE_INDEX
        shards = supervised.view(dist.get_world_size(group) if sequence_parallel else 1, -1)
        own = shards[dist.get_rank(group) if sequence_parallel else 0]
        index, mine = (x.nonzero()[:, 0] for x in (supervised, own))
        counts = shards.sum(1).tolist()
        place = index
        if sequence_parallel:  # each rank's rows are at the front of its part of the pool; all parts have equal size
            offset = torch.arange(len(counts), device=index.device) * max(counts)
            order = torch.arange(shards.shape[1], device=index.device)
            first = torch.tensor(counts, device=index.device)
            place = (offset[:, None] + order)[order < first[:, None]]
        full = len(place) == (max(counts) * len(counts) if sequence_parallel else len(label))
        label, index, mine = (x.to(device, non_blocking=True) for x in (label[index], index, mine))
        in_pool = None if full else place.to(device, non_blocking=True)
        return SupervisedRows(label, index, mine, in_pool, counts, group, sequence_parallel)

    @property
    def n(self) -> int:
        """Return the number of rows with a label on all ranks."""
        return sum(self.counts)

    def pick(self, x: Tensor) -> Tensor:
        """Select the values of the rows with a label: x [s*b] -> [n]."""
        return x[self.index]

    def spread(self, x: Tensor, shape: torch.Size) -> Tensor:
        """Write x [n] into zeros of `shape`, which has s*b elements, at the rows with a label."""
        return x.new_zeros(shape.numel()).index_copy_(0, self.index, x).view(shape)

    def pool(self, hidden: Tensor) -> Tensor:
        """Return the pool [p, h]: this rank's hidden states; under SP all ranks', by one all-gather [longest, h]."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        if not self.sequence_parallel:
            return flat
        own = flat if len(self.mine) == len(flat) else flat[self.mine]
        own = torch.nn.functional.pad(own, (0, 0, 0, max(self.counts) - len(own)))
        everyone = own.new_empty(len(self.counts) * len(own), own.shape[1])
        dist.all_gather_into_tensor(everyone, own, group=self.group)
        return everyone

    def take(self, pool: Tensor, rows: slice) -> Tensor:
        """Return some of the n rows from the pool, [rows, h]; a view of it where every row of the pool has a label."""
        return pool[rows] if self.place is None else pool[self.place[rows]]

    def put(self, pool: Tensor, rows: slice, x: Tensor) -> None:
        """Write x [rows, h], of any dtype, to its rows of the pool, in place."""
        if self.place is None:
            pool[rows].copy_(x)
        else:
            pool.index_copy_(0, self.place[rows], x.to(pool.dtype))

    def empty_pool(self, hidden: Tensor) -> Tensor:
        """Return zeros [p, h] of hidden's dtype, for the gradient of the hidden states."""
        p = len(self.counts) * max(self.counts) if self.sequence_parallel else hidden.numel() // hidden.shape[-1]
        return hidden.new_zeros(p, hidden.shape[-1])

    def unpool(self, gradient: Tensor, hidden: Tensor) -> Tensor:
        """Sum the gradient pools of all vocabulary shards -> the gradient of this rank's hidden states.

        One collective in the dtype of the hidden states, as in Megatron: an all-reduce [n, h], or under SP a
        reduce-scatter [tp*longest, h].
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
