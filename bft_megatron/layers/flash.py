"""Causal attention over sequences of different lengths by torch's flash kernel, on GPUs in fp16 and bf16.

`torch.nn.attention.varlen` aligns a causal mask at the last query and the last key. So a context-parallel rank's chunk
of a sample is passed as a sequence whose keys are the sample's keys up to the chunk's end. Nothing here waits for the
GPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

varlen_attn: Callable[..., Any] | None  # whose signature differs from release to release
try:
    from torch.nn.attention import varlen
except ImportError:  # torch before 2.10
    varlen_attn = None
else:
    varlen_attn = varlen.varlen_attn

_NAMES = frozenset(inspect.signature(varlen_attn).parameters) if varlen_attn is not None else frozenset()


def is_there() -> bool:
    """Return whether the installed torch has the kernel, with a scale and windows: 2.11 and later."""
    return "scale" in _NAMES and "window_size" in _NAMES


def can(query: Tensor, dropout: float) -> bool:
    """Return whether the kernel supports query [t, n, d]: on a GPU, in 16 bits, d up to 256, without dropout."""
    dtypes = (torch.bfloat16, torch.float16)
    return is_there() and query.is_cuda and query.dtype in dtypes and query.shape[-1] <= 256 and not dropout


def samples(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float | None,
    window: tuple[int, int] | None,
) -> Tensor:
    """Attend within each sample.

    Args:
        query: [t, n, d]; key, value: [t, g, d]; all samples concatenated.
        cu_seqlens: [B+1] int32, the samples' edges.
        longest: an upper bound of a sample's tokens.
        scale: the factor of the scores; None for 1 / sqrt(d).
        window: (w, 0) lets a query see its own key and the w before it; None: all keys before it.

    Returns:
        [t, n*d].
    """
    return _call(query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale, window)


def chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    cp: int,
    rank: int,
    scale: float | None,
    window: tuple[int, int] | None,
) -> Tensor:
    """Attend from a context-parallel rank's two chunks of every sample, `rank` and 2*cp - 1 - `rank` of its 2*cp.

    Args:
        query: [t/cp, n, d], this rank's chunks; key, value: [t, g, d], whole samples in sequence order.
        The others are as in `samples`.

    Returns:
        [t/cp, n*d].
    """
    chunk = (cu_seqlens.diff() // (2 * cp)).repeat_interleave(2, output_size=2 * (len(cu_seqlens) - 1))  # [2B]
    before = torch.tensor([rank + 1, 2 * cp - rank], device=query.device).repeat(len(cu_seqlens) - 1)
    lengths = chunk * before  # [2B] number of keys that a chunk sees
    total = key.shape[0] // (2 * cp) * (2 * cp + 1)
    edges_q, edges_k = (torch.nn.functional.pad(n.cumsum(0), (1, 0)).int() for n in (chunk, lengths))
    sequence = torch.arange(len(lengths), device=query.device).repeat_interleave(lengths, output_size=total)
    start = cu_seqlens[:-1].repeat_interleave(2, output_size=len(lengths))
    at = torch.arange(total, device=query.device) - edges_k[sequence] + start[sequence]
    return _call(query, key[at], value[at], edges_q, edges_k, longest // (2 * cp), longest, scale, window)


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edges_q: Tensor,
    edges_k: Tensor,
    longest_q: int,
    longest_k: int,
    scale: float | None,
    window: tuple[int, int] | None,
) -> Tensor:
    """Call the kernel: grouped heads are asked for by `enable_gqa` in the releases of torch that have it."""
    assert varlen_attn is not None, "`can` is asked first"
    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0) if window is None else window}
    if "enable_gqa" in _NAMES:
        options["enable_gqa"] = True
    out: Tensor = varlen_attn(
        *(x.contiguous() for x in (query, key, value)), edges_q, edges_k, longest_q, longest_k, **options
    )
    return out.flatten(1)
