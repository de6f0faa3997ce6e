"""Core attention in plain torch, with the packed rows and context parallelism that Megatron's own torch layer lacks."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from bft_megatron.layers import flash
from bft_megatron.objective.view import zigzag


class CoreAttention(torch.nn.Module):
    """Causal attention within each sample, over packed rows [t, n, d] or padded batches [s, b, n, d], on any CP size.

    Under context parallelism a rank holds two chunks of every sample (`zigzag`). Keys and values are all-gathered over
    CP (a reduce-scatter in the backward pass) and put into sequence order; queries stay on their rank. On a GPU in fp16
    or bf16, torch's flash kernel runs over all samples at once. Elsewhere `scaled_dot_product_attention` is called once
    for each sample: the masks stay small, and a sample's result does not depend, to the bit, on the others in its row.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        assert pg_collection is not None, "Megatron's layers pass their groups"
        self.cp_group = pg_collection.cp
        self.softmax_scale = softmax_scale
        self.window = config.window_size
        self.dropout = config.attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend: query [t/cp, n, d], key, value [t/cp, g, d] -> [t/cp, n*d]; padded: [s/cp, b] in place of [t/cp]."""
        if packed_seq_params is not None:
            edges = packed_seq_params.cu_seqlens_q_padded
            edges = packed_seq_params.cu_seqlens_q if edges is None else edges
            return self._attend(query, key, value, edges, packed_seq_params.max_seqlen_q)
        s, b = query.shape[0] * self.cp_group.size(), query.shape[1]
        query, key, value = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))  # [b * s/cp, n, d]
        edges = torch.arange(b + 1, dtype=torch.int32, device=query.device) * s
        out = self._attend(query, key, value, edges, s)
        return out.unflatten(0, (b, -1)).transpose(0, 1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        cp, rank = self.cp_group.size(), self.cp_group.rank()
        if cp > 1:
            order = torch.cat([zigzag(cu_seqlens, cp, r) for r in range(cp)]).argsort()
            key, value = (self._gather(x)[order] for x in (key, value))
        dropout = self.dropout if self.training else 0.0
        if flash.can(query, dropout):
            if cp > 1:
                return flash.chunks(query, key, value, cu_seqlens, longest, cp, rank, self.softmax_scale, self.window)
            return flash.samples(query, key, value, cu_seqlens, longest, self.softmax_scale, self.window)
        return self._one_by_one(query, key, value, cu_seqlens, dropout)

    def _one_by_one(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, dropout: float) -> Tensor:
        """Attend one sample at a time; waits for the device to read the samples' lengths."""
        cp, rank = self.cp_group.size(), self.cp_group.rank()
        lengths = cu_seqlens.diff()
        position = torch.arange(int(cu_seqlens[-1]), device=query.device)
        position = position - torch.repeat_interleave(cu_seqlens[:-1], lengths)  # within the sample
        mine = position[zigzag(cu_seqlens, cp, rank)]
        out = [
            self._attend_sample(q, k, v, at, dropout)
            for q, k, v, at in zip(
                query.split((lengths // cp).tolist()),
                key.split(lengths.tolist()),
                value.split(lengths.tolist()),
                mine.split((lengths // cp).tolist()),
                strict=True,
            )
        ]
        return torch.cat(out)

    def _attend_sample(self, query: Tensor, key: Tensor, value: Tensor, at: Tensor, dropout: float) -> Tensor:
        """Attend from query [q, n, d], at positions `at` [q] of a sample, to its key, value [k, g, d] -> [q, n*d]."""
        back = at[:, None] - torch.arange(key.shape[0], device=at.device)  # [q, k]: tokens from key to query
        allowed = back >= 0
        if self.window is not None:
            allowed &= back <= self.window[0]
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))  # [1, n, q, d]
        # Tensor-parallel ranks hold different heads, so each draws from its own stream.
        with tensor_parallel.get_cuda_rng_tracker().fork() if dropout else contextlib.nullcontext():
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, allowed, dropout, scale=self.softmax_scale, enable_gqa=True
            )
        return out[0].transpose(0, 1).flatten(1)

    def _gather(self, x: Tensor) -> Tensor:
        # The backward pass of torch.distributed.nn's all_gather fails on gloo's subgroups; Megatron's own works on all
        # groups.
        return tensor_parallel.gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group)
