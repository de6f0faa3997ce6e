"""Rotary embedding of packed rows without waiting for the device, on any context-parallel rank.

Megatron's own reads every sample's length on the host in every layer and turns a sample at a time. The values here are
the same to the bit: each token takes the frequencies of its position in its sample.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def positions(cu_seqlens: Tensor, tokens: int, cp: int, rank: int) -> Tensor:
    """Return the position in its sample of each of a context-parallel rank's tokens, [tokens] int64.

    Args:
        cu_seqlens: [B+1] int, the edges of the samples in the whole row.
        tokens: how many of the row's tokens the rank holds.
        cp, rank: the context-parallel size and this rank, which holds chunks `rank` and
            2*cp - 1 - `rank` of the 2*cp of a sample.
    """
    edges = cu_seqlens.long() // cp
    at = torch.arange(tokens, device=edges.device)
    sample = torch.searchsorted(edges[1:], at, right=True)
    offset = at - edges[sample]
    if cp == 1:
        return offset
    chunk = edges.diff()[sample] // 2
    return offset + torch.where(offset < chunk, rank, 2 * cp - 2 - rank) * chunk


def apply_packed(t: Tensor, cu_seqlens: Tensor, freqs: Tensor, cp_group: dist.ProcessGroup, **options: Any) -> Tensor:
    """Rotate t [tokens, n, d] of a packed row by freqs [longest, 1, 1, d] -> [tokens, n, d].

    Args:
        options: those of Megatron's `_apply_rotary_pos_emb_bshd`.
    """
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    at = positions(cu_seqlens, t.shape[0], cp_group.size(), cp_group.rank())
    return _apply_rotary_pos_emb_bshd(t.unsqueeze(1), freqs[at], **options).squeeze(1)


def install() -> None:
    """Have Megatron's unfused rotary embedding of packed rows done by `apply_packed`."""
    from megatron.core.models.common.embeddings import rope_utils

    def thd(
        t: Tensor,
        cu_seqlens: Tensor,
        freqs: Tensor,
        rotary_interleaved: bool = False,
        mla_rotary_interleaved: bool = False,
        mscale: float = 1.0,
        cp_group: dist.ProcessGroup | None = None,
        multi_latent_attention: bool | None = None,
    ) -> Tensor:
        return apply_packed(
            t,
            cu_seqlens,
            freqs,
            cp_group,
            rotary_interleaved=rotary_interleaved,
            mla_rotary_interleaved=mla_rotary_interleaved,
            mscale=mscale,
        )

    rope_utils._apply_rotary_pos_emb_thd = thd
