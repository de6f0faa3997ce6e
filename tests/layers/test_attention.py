"""The CPU's core attention against softmax written out: causal, within a sample, grouped, windowed, any CP."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bft_megatron.objective.view import zigzag
from tests.helpers.world import run_world

HEADS, GROUPS, DIM = 4, 2, 8
EDGES = [0, 8, 32, 36, 64]
CP = 2


def attention(group: dist.ProcessGroup, window: int | None):
    from bft_megatron.layers.attention import CoreAttention

    config = SimpleNamespace(window_size=None if window is None else (window - 1, 0), attention_dropout=0.0)
    return CoreAttention(config, 1, None, "self", pg_collection=SimpleNamespace(cp=group))


def written_out(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """One sample, [t, n, d] float64 -> [t, n*d]: loops over heads and positions."""
    out = torch.zeros_like(query)
    for n in range(HEADS):
        g = n // (HEADS // GROUPS)
        for t in range(len(query)):
            first = 0 if window is None else max(0, t + 1 - window)
            scores = key[first : t + 1, g] @ query[t, n] / math.sqrt(DIM)
            out[t, n] = scores.softmax(0) @ value[first : t + 1, g]
    return out.flatten(1)


def tensors(seed: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(EDGES[-1], n, DIM) for n in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in shapes]


def run_packed(window: int | None) -> tuple[Tensor, list[Tensor]]:
    """This rank's share of the packed row's output, and its part of the inputs' gradients."""
    group = dist.group.WORLD
    mine = zigzag(torch.tensor(EDGES), dist.get_world_size(group), dist.get_rank(group))
    inputs = tensors()
    packed = SimpleNamespace(cu_seqlens_q_padded=torch.tensor(EDGES, dtype=torch.int32), max_seqlen_q=28)
    out = attention(group, window)(*(x[mine] for x in inputs), None, packed_seq_params=packed)
    upstream = torch.randn(EDGES[-1], HEADS * DIM, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (out * upstream[mine]).sum().backward()
    return out.detach(), [x.grad for x in inputs]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("cp", [1, CP])
def test_packed_rows(window: int | None, cp: int):
    ranks = run_world(cp, run_packed, window, megatron=True)
    inputs = tensors()
    expected = torch.cat([written_out(*(x[a:b] for x in inputs), window) for a, b in pairwise(EDGES)])
    upstream = torch.randn(EDGES[-1], HEADS * DIM, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (expected * upstream).sum().backward()
    for rank, (out, _) in enumerate(ranks):
        torch.testing.assert_close(out, expected.detach()[zigzag(torch.tensor(EDGES), cp, rank)])
    for i, x in enumerate(inputs):
        torch.testing.assert_close(sum(gradients[i] for _, gradients in ranks), x.grad)


def run_padded() -> Tensor:
    query, key, value = (x.detach().view(2, 32, -1, DIM).transpose(0, 1) for x in tensors())  # [s, b, n, d]
    return attention(dist.group.WORLD, None)(query, key, value, None)


def test_padded_rows_are_samples_of_their_own():
    (out,) = run_world(1, run_padded, megatron=True)
    query, key, value = (x.detach().view(2, 32, -1, DIM) for x in tensors())
    for b in range(2):
        torch.testing.assert_close(out[:, b], written_out(query[b], key[b], value[b], None))
