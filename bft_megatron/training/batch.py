"""A micro-batch: whole rows as our data set yields them, and the part of them that one rank runs through the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from bft_megatron.data.columns import Columns
from bft_megatron.objective.view import Geometry
from bft_megatron.recipe.schema import ObjectiveSettings


@dataclass(frozen=True)
class Batch(Columns):
    """One micro-batch as the data set yields it, on the CPU: whole rows, with all context-parallel ranks' tokens."""

    @cached_property
    def edges(self) -> Tensor:
        """Return the samples' edges in the flattened rows, [B+1] int."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens[0]
        b, s = self.tokens.shape
        return torch.arange(b + 1) * s

    @cached_property
    def counted(self) -> Tensor:
        """Return which segments are samples, [B] bool; a packed row's tail and a filler row are not."""
        if self.cu_seqlens is None:
            return self.samples > 0
        return torch.arange(len(self.edges) - 1) < self.samples

    def geometry(self, cp_windows: Literal["per_rank", "exact"]) -> Geometry:
        """Return the batch's geometry for the objective, under this rank's context-parallel group."""
        group = parallel_state.get_context_parallel_group()
        return Geometry(self.labels.flatten(), self.edges, self.counted, self.weight.flatten(), group, cp_windows)

    def micro_batch(self, settings: ObjectiveSettings, *, mask_padding: bool) -> MicroBatch:
        """Return this context-parallel rank's part of the batch.

        Args:
            mask_padding: include which tokens are padding.
        """
        geometry = self.geometry(settings.cp_windows)
        return MicroBatch(
            geometry,
            tokens=geometry.part(self.tokens),
            position_ids=geometry.part(self.position_ids),
            labels=geometry.part(self.labels),
            padding=geometry.part(self.padding) if mask_padding else None,
            packed_seq_params=self.packed_seq_params(),
        )

    def packed_seq_params(self) -> PackedSeqParams | None:
        """Return what rotary embedding and attention need of a packed row, on every stage; None for padded rows."""
        if self.cu_seqlens is None or self.max_seqlen is None:
            return None
        return packed_seq_params(self.edges, int(self.max_seqlen))


def packed_seq_params(edges: Tensor, longest: int) -> PackedSeqParams:
    """Return Megatron's description of a packed row.

    Args:
        edges: [k + 1] int32, the edges of its segments with their padding: padding is at a segment's end, after every
            query that counts, so these serve for both kinds that Megatron knows.
        longest: the length of the longest segment.
    """
    edges = edges.cuda(non_blocking=True)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=edges,
        cu_seqlens_kv=edges,
        cu_seqlens_q_padded=edges,
        cu_seqlens_kv_padded=edges,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One micro-batch on one rank: this context-parallel rank's part [b, s/cp] of its rows.

    A stage that does not embed needs no tokens, and one without the output layer no labels.
    """

    geometry: Geometry | None
    """The geometry of the whole rows; None without labels"""
    tokens: Tensor | None
    """[b, s/cp] int64"""
    position_ids: Tensor | None
    """[b, s/cp] int64"""
    labels: Tensor | None
    """[b, s/cp] int64, on the CPU"""
    padding: Tensor | None = None
    """[b, s/cp] bool, for the routers of a mixture of experts"""
    attention_mask: Tensor | None = None
    """Megatron's mask of padded rows; None: attention is causal within each sample"""
    packed_seq_params: PackedSeqParams | None = None
    """None for padded rows"""
