"""The attention of `layers` on a GPU against float64: the flash kernel for every context-parallel rank, packed rows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bft_megatron.layers import flash
from bft_megatron.objective.view import zigzag

HEADS, GROUPS, DIM = 8, 2, 64
EDGES = [0, 64, 192, 208, 512]


def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Whole row in float64, [t, n, d] -> [t, n*d]: a mask that is causal and within a sample."""
    edges = torch.tensor(EDGES, device=query.device)
    sample = torch.bucketize(torch.arange(EDGES[-1], device=query.device), edges[1:-1], right=True)
    at = torch.arange(EDGES[-1], device=query.device)
    allowed = (sample[:, None] == sample) & (at[:, None] >= at)
    q, k, v = (x.double().transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(HEADS // GROUPS, 0) for x in (k, v))
    scores = (q @ k.transpose(1, 2) / DIM**0.5).masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def tensors(dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    shapes = [(EDGES[-1], n, DIM) for n in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape, generator=g).to("cuda", dtype).requires_grad_() for shape in shapes]


def distance(x: Tensor, to: Tensor) -> float:
    return float((x.double() - to.double()).norm() / to.double().norm())


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_every_rank_of_context_parallelism(cp: int):
    """All ranks' shares one after the other on one card; keys and values are whole, as after the gather."""
    query, key, value = tensors(torch.bfloat16)
    edges, longest = torch.tensor(EDGES, dtype=torch.int32, device="cuda"), 304
    upstream = torch.randn(EDGES[-1], HEADS * DIM, generator=torch.Generator().manual_seed(4)).cuda()
    assert flash.can(query, 0.0)
    out = torch.zeros(EDGES[-1], HEADS * DIM, device="cuda")
    for rank in range(cp):
        mine = zigzag(edges, cp, rank)
        share = (query[mine], key, value, edges, longest)
        part = flash.chunks(*share, cp, rank, None, None) if cp > 1 else flash.samples(*share, None, None)
        out = out.index_copy(0, mine, part.float())
    found = torch.autograd.grad((out * upstream).sum(), (query, key, value))
    expected = written_out(query, key, value)
    assert distance(out, expected) < 4e-3
    for x, to in zip(found, torch.autograd.grad((expected * upstream).sum(), (query, key, value)), strict=True):
        assert distance(x, to) < 8e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packed_row_through_the_module(dtype: torch.dtype):
    from bft_megatron.layers.attention import CoreAttention

    inputs, alone = tensors(dtype), SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    config = SimpleNamespace(window_size=None, attention_dropout=0.0)
    attention = CoreAttention(config, 1, None, "self", pg_collection=SimpleNamespace(cp=alone))
    packed = SimpleNamespace(
        cu_seqlens_q_padded=torch.tensor(EDGES, dtype=torch.int32, device="cuda"), max_seqlen_q=304
    )
    out = attention(*inputs, None, packed_seq_params=packed)
    assert distance(out, written_out(*inputs)) < (1e-6 if dtype == torch.float32 else 4e-3)
