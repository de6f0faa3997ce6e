"""The gated delta rule and the convolution before it in plain torch, for samples that are packed in a row.

A state S [dk, dv] of each head decays, forgets what it had stored under a key, and stores the key's value:

    S_t = a_t S_(t-1) + k_t u_t      u_t = beta_t (v_t - a_t S_(t-1)^T k_t)
    o_t = S_t^T q_t / sqrt(dk)       a_t = exp(g_t)

A chunk of tokens is computed at once: with G the sums of g over it, its u solve the triangular system

    u_i + sum_(j<i) beta_i (k_i k_j) exp(G_i - G_j) u_j = beta_i (v_i - exp(G_i) S^T k_i)

(Yang, Kautz and Hatamizadeh, Gated Delta Networks, arXiv:2412.06464, section 3.3). Functions and arguments are those of
flash-linear-attention that Megatron's layer calls.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
"""Tokens of a chunk."""


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Return x [..., d] divided by its length over d, computed in fp32, in the dtype of x."""
    wide = _wide(x)
    return (wide * (wide.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Convolve each channel over the tokens of its sample up to each token, in fp32.

    Args:
        x: [b, s, d].
        weight: [d, taps], the last for the token itself.
        activation: `silu` or `swish`; None for none.
        cu_seqlens: [samples + 1] int, the edges of the samples of one row; None: each row is a sample.

    Returns:
        [b, s, d] in the dtype of x, and None in place of the final state.
    """
    s, taps = x.shape[1], weight.shape[1]
    at = torch.arange(s, device=x.device)
    if cu_seqlens is not None:
        edges = cu_seqlens.long()
        at = at - edges[torch.searchsorted(edges[1:], at, right=True)]
    filled = F.pad(_wide(x), (0, 0, taps - 1, 0))  # kept once for the backward pass: the taps are views of it
    out = filled[:, taps - 1 :] * weight[:, -1] + (0 if bias is None else bias)
    for back in range(1, taps):
        earlier = filled[:, taps - 1 - back :][:, :s] * weight[:, -1 - back]
        out = out + torch.where((at >= back)[:, None], earlier, 0)
    return (F.silu(out) if activation else out).to(x.dtype), None


def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor | None = None, **_: Any
) -> tuple[Tensor, None]:
    """Return the rule's outputs, each sample from a state of zeros, one sample of a packed row at a time.

    Args:
        q, k: [b, s, n, dk].
        v: [b, s, n, dv].
        g: [b, s, n], the logarithm of the decay.
        beta: [b, s, n].
        cu_seqlens: as of `causal_conv1d`; reading the lengths waits for the device.

    Returns:
        [b, s, n, dv] in the dtype of q, computed in fp32, and None in place of the final state.
    """
    by_head = [_wide(x).transpose(1, 2) for x in (q, k, v, g, beta)]  # [b, n, s, ...]
    lengths = [q.shape[1]] if cu_seqlens is None else [n for n in cu_seqlens.diff().tolist() if n]
    samples = zip(*(x.split(lengths, 2) for x in by_head), strict=True)
    out = torch.cat([_sample(*sample) for sample in samples], 2)
    return out.transpose(1, 2).to(q.dtype), None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _sample(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Return a sample's outputs [b, n, s, dv]; the tokens that fill the last chunk store nothing."""
    s = q.shape[2]
    size = min(CHUNK, s)
    q, k, v, g, beta = (_chunked(x, size) for x in (q * q.shape[-1] ** -0.5, k, v, g, beta))
    total = g.double().cumsum(-1)  # a difference of two sums of hundreds has only 1e-5 in fp32
    since_start, until_end = total.to(q).exp(), (total[..., -1:] - total).to(q).exp()
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    between = (total[..., :, None] - total[..., None, :]).to(q).masked_fill(later, -torch.inf).exp()  # [..., i, j]
    own, of_state = _solved(k, v, since_start, between, beta)
    seen = q @ k.mT * between
    from_state, kept = q * since_start[..., None], (k * until_end[..., None]).mT
    whole = since_start[..., -1, None, None]
    state, out = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1]), []
    # unbound, since the backward pass of an index fills a tensor of the whole sample a chunk
    for chunk in zip(*(x.unbind(2) for x in (own, of_state, seen, from_state, kept, whole)), strict=True):
        made, state = _next(state, *chunk)
        out.append(made)
    return torch.stack(out, 2).flatten(2, 3)[:, :, :s]


def _next(
    state: Tensor, own: Tensor, of_state: Tensor, seen: Tensor, from_state: Tensor, kept: Tensor, whole: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a chunk's outputs and the state [b, n, dk, dv] after it, from that before it."""
    stored = own - of_state @ state
    return from_state @ state + seen @ stored, whole * state + kept @ stored


def _solved(k: Tensor, v: Tensor, since_start: Tensor, between: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Solve each chunk's system: its u are the first result less the second times the state at the chunk's start."""
    weighted = k * beta[..., None]
    system = weighted @ k.mT * between  # whose diagonal is not read: it is one
    right = torch.cat([v * beta[..., None], weighted * since_start[..., None]], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    own, of_state = solved.split([v.shape[-1], k.shape[-1]], -1)
    return own, of_state


def _chunked(x: Tensor, size: int) -> Tensor:
    """Return x [b, n, s, ...] as chunks [b, n, chunks, size, ...], the last one filled with zeros."""
    filled = F.pad(x, (0, 0) * (x.dim() - 3) + (0, -x.shape[2] % size))
    return filled.unflatten(2, (-1, size))
