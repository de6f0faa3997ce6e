"""The gated delta rule and its convolution on a GPU against float64, torch's and flash-linear-attention's."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from bft_megatron.layers import delta_rule

HEADS, DIM, TAPS = 4, 64, 4
EDGES = [0, 1, 3, 70, 70, 200, 512]
"""Samples shorter than the convolution, of no token, and of one chunk and more."""


def fla_rule(*args: Any, **kwargs: Any) -> Any:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(*args, **kwargs)


def fla_convolution(*args: Any, **kwargs: Any) -> Any:
    from fla.modules.convolution import causal_conv1d

    return causal_conv1d(*args, **kwargs)


def fla_norm(x: Tensor) -> Tensor:
    from fla.modules.l2norm import l2norm

    return l2norm(x)


FUNCTIONS = {
    "torch": (delta_rule.chunk_gated_delta_rule, delta_rule.causal_conv1d, delta_rule.l2norm),
    "fla": (fla_rule, fla_convolution, fla_norm),
}


@pytest.fixture(params=FUNCTIONS)
def functions(request: pytest.FixtureRequest) -> tuple[Callable[..., Any], ...]:
    if request.param == "fla":
        pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    return FUNCTIONS[request.param]


def edges() -> Tensor:
    return torch.tensor(EDGES, dtype=torch.int32, device="cuda")


def row(decay: float, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, g, beta of a packed row, rounded to the dtype but for the decay, which Megatron's layer has in fp32."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, EDGES[-1], HEADS, *shape, generator=generator)

    q, k = (torch.nn.functional.normalize(draw(DIM), dim=-1) for _ in range(2))
    v, g, beta = draw(DIM), -decay * draw().abs(), draw().sigmoid()
    return [x.to("cuda", torch.float32 if x is g else dtype).requires_grad_() for x in (q, k, v, g, beta)]


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """A sample, [s, n, d] each, token by token."""
    state, out = q.new_zeros(HEADS, DIM, DIM), []
    for t in range(len(q)):
        state = state * g[t].exp()[:, None, None]
        stored = beta[t, :, None] * (v[t] - torch.einsum("nkv,nk->nv", state, k[t]))
        state = state + torch.einsum("nk,nv->nkv", k[t], stored)
        out.append(torch.einsum("nkv,nk->nv", state, q[t]) / DIM**0.5)
    return torch.stack(out)


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    """A sample [s, d], token by token."""
    filled = torch.nn.functional.pad(x, (0, 0, TAPS - 1, 0))
    rows = [(filled[t : t + TAPS] * weight.t()).sum(0) for t in range(len(x))]
    return torch.nn.functional.silu(torch.stack(rows))


def by_sample(function: Callable[..., Tensor], inputs: list[Tensor], *others: Tensor) -> Tensor:
    parts = [[x[0, a:b] for x in inputs] for a, b in pairwise(EDGES)]
    return torch.cat([function(*part, *others) for part in parts if len(part[0])])[None]


def distances(out: Tensor, of: list[Tensor], expected: Tensor, expected_of: list[Tensor]) -> list[float]:
    """Of the output and of each gradient, relative to its norm."""
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.device)
    found = [out, *torch.autograd.grad((out * upstream.to(out)).sum(), of)]
    upstream = upstream.to(out.dtype).double()
    wanted = [expected, *torch.autograd.grad((expected * upstream).sum(), expected_of)]
    return [float((x.double() - to).norm() / to.norm()) for x, to in zip(found, wanted, strict=True)]


def doubled(inputs: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in inputs]


DTYPES = pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
"""flash-linear-attention multiplies fp32 in TF32."""


@pytest.mark.parametrize("decay", [0.01, 1.0, 20.0])
@DTYPES
def test_a_packed_row(functions: tuple[Callable[..., Any], ...], decay: float, dtype: torch.dtype, close: float):
    inputs = row(decay, dtype)
    exact = doubled(inputs)
    q, k, v, g, beta = inputs
    out, _ = functions[0](q, k, v, g=g, beta=beta, cu_seqlens=edges(), use_qk_l2norm_in_kernel=False)
    assert out.dtype == dtype
    ours = functions[0] is delta_rule.chunk_gated_delta_rule and dtype == torch.float32
    assert max(distances(out, inputs, by_sample(recurrence, exact), exact)) < (5e-6 if ours else close)


@DTYPES
def test_the_convolution(functions: tuple[Callable[..., Any], ...], dtype: torch.dtype, close: float):
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(shape, generator=generator) for shape in [(1, EDGES[-1], 3 * DIM), (3 * DIM, TAPS)]]
    x, weight = inputs = [t.to("cuda", dtype).requires_grad_() for t in inputs]
    exact = doubled(inputs)
    out, _ = functions[1](x=x, weight=weight, bias=None, activation="silu", cu_seqlens=edges())
    assert max(distances(out, inputs, by_sample(convolution, exact[:1], exact[1]), exact)) < close


@DTYPES
def test_the_norm(functions: tuple[Callable[..., Any], ...], dtype: torch.dtype, close: float):
    x = torch.randn(1, 512, HEADS, DIM, generator=torch.Generator().manual_seed(4)).to("cuda", dtype).requires_grad_()
    (exact,) = doubled([x])
    expected = exact / (exact.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    assert max(distances(functions[2](x), [x], expected, [exact])) < close
