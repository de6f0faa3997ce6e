"""Which rows of a batch have a label, and their way between this rank's hidden states and the rows that are computed.

The index work, the gather and the reduction over tensor parallelism of the head without logits; what is computed of the
rows is in linear_logprobs.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bft_megatron.objective import IGNORE_INDEX


@dataclass(frozen=True, eq=False)
class KeptRows:
    """The n rows that have a label, in sequence order, among all s*b and among those that this rank holds."""

    label: Tensor  # [n] int64
    index: Tensor  # [n] int64, among all rows
    mine: Tensor  # [m] int64, among this rank's
    counts: list[int]  # how many each rank holds; under sequence parallelism alone more than one entry
    group: dist.ProcessGroup | None
    sequence_parallel: bool

    @staticmethod
    def of(targets: Tensor, device: torch.device, group: dist.ProcessGroup | None, sequence_parallel: bool) -> KeptRows:
        """targets [s, b], wherever they are -> the rows, on `device`."""
        label = targets.reshape(-1)
        valid = label != IGNORE_INDEX
        shards = valid.view(dist.get_world_size(group) if sequence_parallel else 1, -1)
        own = shards[dist.get_rank(group) if sequence_parallel else 0]
        index, mine = (x.nonzero()[:, 0] for x in (valid, own))
        label, index, mine = (x.to(device, non_blocking=True) for x in (label[index], index, mine))
        return KeptRows(label, index, mine, shards.sum(1).tolist(), group, sequence_parallel)

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

    def gather(self, hidden: Tensor) -> Tensor:
        """This rank's hidden states -> the rows that count, [n, h]. Under SP one all-gather [longest, h]."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        own = flat if len(self.mine) == len(flat) else flat[self.mine]
        if not self.sequence_parallel:
            return own
        longest = max(self.counts)
        own = torch.nn.functional.pad(own, (0, 0, 0, longest - len(own)))
        everyone = own.new_empty(len(self.counts) * longest, own.shape[1])
        dist.all_gather_into_tensor(everyone, own, group=self.group)
        if min(self.counts) == longest:
            return everyone
        return torch.cat([part[:count] for part, count in zip(everyone.split(longest), self.counts, strict=True)])

    def scatter(self, gradient: Tensor, hidden: Tensor) -> Tensor:
        """gradient [n, h] of this vocabulary shard -> that of this rank's hidden states, in their dtype.

        One collective, in that dtype as Megatron's: an all-reduce [n, h], under SP a reduce-scatter [tp*longest, h].
        """
        own = gradient.to(hidden.dtype)
        if self.n and self.sequence_parallel:
            longest = max(self.counts)
            parts = own.split(self.counts)
            padded = torch.cat([torch.nn.functional.pad(p, (0, 0, 0, longest - len(p))) for p in parts])
            own = padded.new_empty(longest, padded.shape[1])
            dist.reduce_scatter_tensor(own, padded, group=self.group)
            own = own[: len(self.mine)]
        elif self.n and self.group is not None and dist.get_world_size(self.group) > 1:
            dist.all_reduce(own, group=self.group)
        if own.numel() == hidden.numel():
            return own.view(hidden.shape)
        whole = hidden.new_zeros(hidden.numel() // hidden.shape[-1], hidden.shape[-1])
        return whole.index_copy_(0, self.mine, own).view(hidden.shape)
