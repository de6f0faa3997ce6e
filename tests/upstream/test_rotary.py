"""Our rotary embedding of packed rows has the bits of Megatron's own, on every context-parallel rank."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils

from bft_megatron.upstream import rotary

EDGES = [0, 8, 32, 40, 104]
LONGEST = 64


@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize("partial", [False, True])
def test_has_megatrons_bits(cp: int, partial: bool):
    g = torch.Generator().manual_seed(1)
    freqs = torch.outer(torch.arange(LONGEST), torch.rand(4 if partial else 8, generator=g))
    freqs = torch.cat([freqs, freqs], -1)[:, None, None]
    edges = torch.tensor(EDGES, dtype=torch.int32)
    for rank in range(cp):
        group = SimpleNamespace(size=lambda: cp, rank=lambda rank=rank: rank)
        t = torch.randn(EDGES[-1] // cp, 3, 16, generator=g)
        expected = rope_utils._apply_rotary_pos_emb_thd(t, edges, freqs, cp_group=group)
        assert not torch.equal(expected, t)
        assert torch.equal(rotary.apply_packed(t, edges, freqs, group), expected)
