"""Rotary embedding of packed rows without waiting for the device, on any context-parallel rank.

Each token takes the frequencies of its position in its sample; the values are the same bits as Megatron's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bft_megatron.upstream.change import Change

THD = Change(
    "megatron.core.models.common.embeddings.rope_utils:_apply_rotary_pos_emb_thd",
    "replaced",
    "It reads the samples' lengths on the host in every layer, which waits for the GPU, and rotates one sample at a "
    "time.",
    "Megatron's unfused rotary embedding of packed rows stays on the device",
    "tests/upstream/test_rotary.py",
    (
        "t",
        "cu_seqlens",
        "freqs",
        "rotary_interleaved",
        "mla_rotary_interleaved",
        "mscale",
        "cp_group",
        "multi_latent_attention",
    ),
)
BSHD = Change(
    "megatron.core.models.common.embeddings.rope_utils:_apply_rotary_pos_emb_bshd",
    "internal",
    "Megatron's own rotation is used.",
    "it is public",
    "tests/upstream/test_rotary.py",
    ("t", "freqs", "rotary_interleaved", "mla_rotary_interleaved", "mscale"),
)


def positions(cu_seqlens: Tensor, tokens: int, cp: int, rank: int) -> Tensor:
    """Return the position in its sample of each of a context-parallel rank's tokens, [tokens] int64.

    Args:
        cu_seqlens: [B+1] int, the edges of the samples in the whole row.
        tokens: the number of the row's tokens that the rank holds.
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
        options: keyword arguments of Megatron's `_apply_rotary_pos_emb_bshd`.
    """
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    at = positions(cu_seqlens, t.shape[0], cp_group.size(), cp_group.rank())
    return _apply_rotary_pos_emb_bshd(t.unsqueeze(1), freqs[at], **options).squeeze(1)


def install() -> None:
    """Replace Megatron's unfused rotary embedding of packed rows by `apply_packed`."""

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
        assert cp_group is not None, "Megatron passes the group"
        return apply_packed(
            t,
            cu_seqlens,
            freqs,
            cp_group,
            rotary_interleaved=rotary_interleaved,
            mla_rotary_interleaved=mla_rotary_interleaved,
            mscale=mscale,
        )

    THD.put(thd)
