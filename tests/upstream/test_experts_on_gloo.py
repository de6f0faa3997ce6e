"""The exchange of tokens between experts on gloo: what NCCL's collectives of parts of different sizes return."""

from __future__ import annotations

import torch
import torch.distributed as dist

from bft_megatron.upstream import cuda_on_cpu
from tests.helpers.world import run_world

SIZES = [[3, 0, 2], [0, 0, 0], [1, 4, 1]]


def _exchanged() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """By sizes: all ranks' parts gathered, and this rank's part of the sum over ranks."""
    cuda_on_cpu.install()
    from megatron.core.tensor_parallel import mappings

    rank, found = dist.get_rank(), []
    for sizes in SIZES:
        part = torch.arange(sizes[rank] * 2.0).view(-1, 2) + 100 * rank
        whole = torch.arange(sum(sizes) * 2.0).view(-1, 2) * (rank + 1)
        gathered = mappings._gather_along_first_dim(part, dist.group.WORLD, sizes)
        found.append((gathered, mappings._reduce_scatter_along_first_dim(whole, dist.group.WORLD, sizes)))
    return found


def test_parts_of_different_sizes_are_gathered_and_summed():
    ranks = run_world(3, _exchanged, megatron=True)
    for i, sizes in enumerate(SIZES):
        parts = [torch.arange(n * 2.0).view(-1, 2) + 100 * r for r, n in enumerate(sizes)]
        summed = torch.arange(sum(sizes) * 2.0).view(-1, 2) * 6  # 1 + 2 + 3
        for found, own in zip(ranks, summed.split(sizes), strict=True):
            gathered, reduced = found[i]
            assert torch.equal(gathered, torch.cat(parts))
            assert torch.equal(reduced, own)
