"""The gated delta rule in chunks and the convolution against loops over tokens in float64, gradients included."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from bft_megatron.layers import delta_rule

HEADS, KEY, VALUE, TAPS = 2, 6, 5, 4
EDGES = [0, 1, 3, 70, 70, 198]
"""Samples shorter than the convolution, of no token, and of one, two and more chunks."""


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """A sample, [s, n, d] each: the rule of the module's docstring, token by token."""
    state, out = q.new_zeros(q.shape[1], KEY, VALUE), []
    for t in range(len(q)):
        state = state * g[t].exp()[:, None, None]
        stored = beta[t, :, None] * (v[t] - torch.einsum("nkv,nk->nv", state, k[t]))
        state = state + torch.einsum("nk,nv->nkv", k[t], stored)
        out.append(torch.einsum("nkv,nk->nv", state, q[t]) / math.sqrt(KEY))
    return torch.stack(out) if out else v


def inputs(decay: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, EDGES[-1], HEADS, *shape, generator=generator, dtype=torch.float64)

    q, k = (torch.nn.functional.normalize(draw(KEY), dim=-1) for _ in range(2))
    return [q, k, draw(VALUE), -decay * draw().abs(), draw().sigmoid()]


def gradients(out: Tensor, of: list[Tensor]) -> list[Tensor]:
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return list(torch.autograd.grad((out * upstream.to(out)).sum(), of))


def by_sample(function, row: list[Tensor], *others: Tensor) -> Tensor:
    """What a function of a sample returns for each of the row's, one after the other."""
    parts = [[x[0, a:b] for x in row] for a, b in pairwise(EDGES)]
    return torch.cat([function(*part, *others) for part in parts if len(part[0])])[None]


@pytest.mark.parametrize("decay", [0.01, 1.0, 20.0])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_the_rule_in_chunks_is_the_recurrence(decay: float, dtype: torch.dtype, close: float):
    exact = [x.requires_grad_() for x in inputs(decay)]
    expected = by_sample(recurrence, exact)
    ours = [x.detach().to(dtype).requires_grad_() for x in exact]
    out, state = delta_rule.chunk_gated_delta_rule(*ours, cu_seqlens=torch.tensor(EDGES, dtype=torch.int32))
    assert state is None
    assert out.dtype == dtype
    for found, wanted in zip([out, *gradients(out, ours)], [expected, *gradients(expected, exact)], strict=True):
        assert (found.double() - wanted).abs().max() <= close * wanted.abs().max()


def test_rows_without_edges_are_samples():
    row = inputs(1.0)
    (whole,) = (delta_rule.chunk_gated_delta_rule(*(torch.cat([x, x.flip(1)]) for x in row))[0],)
    for i, sample in enumerate(([x[0] for x in row], [x[0].flip(0) for x in row])):
        torch.testing.assert_close(whole[i], recurrence(*sample))


def test_a_sample_does_not_see_its_neighbours():
    edges = torch.tensor(EDGES)
    row = inputs(0.01)
    other = [x.clone() for x in row]
    for x in other:
        x[:, EDGES[2] : EDGES[3]] = x[:, EDGES[2] : EDGES[3]].flip(1)
    one, two = (delta_rule.chunk_gated_delta_rule(*x, cu_seqlens=edges)[0] for x in (row, other))
    kept = torch.ones(EDGES[-1], dtype=torch.bool)
    kept[EDGES[2] : EDGES[3]] = False
    assert torch.equal(one[:, kept], two[:, kept])
    assert not torch.equal(one[:, ~kept], two[:, ~kept])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_the_convolution_stays_within_a_sample(bias: bool, activation: str | None):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, EDGES[-1], 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, TAPS, generator=generator, dtype=torch.float64, requires_grad=True)
    added = torch.randn(3, generator=generator, dtype=torch.float64) if bias else None

    def written_out(sample: Tensor) -> Tensor:
        rows = []
        for t in range(len(sample)):
            row = sum(sample[t - back] * weight[:, TAPS - 1 - back] for back in range(min(TAPS, t + 1)))
            row = row if added is None else row + added
            rows.append(row * torch.sigmoid(row) if activation else row)
        return torch.stack(rows)

    expected = by_sample(written_out, [x])
    out, _ = delta_rule.causal_conv1d(x, weight, added, activation, cu_seqlens=torch.tensor(EDGES))
    torch.testing.assert_close([out, *gradients(out, [x, weight])], [expected, *gradients(expected, [x, weight])])


def test_the_norm_keeps_the_dtype():
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    torch.testing.assert_close(delta_rule.l2norm(x), x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt())
    assert delta_rule.l2norm(x.bfloat16()).dtype == torch.bfloat16
