"""Another trainer's rows as a micro-batch of the step.

Other trainers mark what is learned by a loss mask, and samples by the edges of packed rows. A sample is a segment of a
row with at least one supervised token; a padded row is one segment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from bft_megatron.errors import UserError
from bft_megatron.labels import IGNORE_INDEX
from bft_megatron.objective.view import Geometry
from bft_megatron.training.batch import MicroBatch, packed_seq_params


def micro_batch(
    batch: Mapping[str, Any], edges: Tensor | None, gpt: Any, cp_windows: Literal["per_rank", "exact"]
) -> MicroBatch:
    """Return this context-parallel rank's part of whole rows.

    Args:
        batch: what this stage has of `tokens`, `position_ids` and `labels`, the next tokens, each [b, s] int64;
            `loss_mask` [b, s], 1 where a label is learned and 0 elsewhere; and `attention_mask` [b, 1, s, s] bool, of
            padded rows without context parallelism.
        edges: [B + 1] int, the edges of the packed row's segments with their padding, b = 1; None for padded rows.
        gpt: the model without its wrappers.

    Copies edges, labels and mask to the CPU: this waits once for the GPU.

    Raises:
        UserError: the loss mask has other values than 0 and 1.
    """
    tokens = batch.get("tokens") if gpt.pre_process else None
    labels = batch.get("labels") if gpt.post_process else None
    edges = None if edges is None else edges.cpu()
    packed = None if edges is None else packed_seq_params(edges, int(edges.diff().max()))
    rows = tokens if labels is None else labels
    if rows is None:  # a stage in the middle
        return MicroBatch(None, None, None, None, packed_seq_params=packed)
    if labels is None:
        learned = torch.full(rows.shape, IGNORE_INDEX)
    else:
        learned = _learned(labels.cpu(), batch["loss_mask"].cpu())
    b, s = rows.shape
    segments = torch.arange(b + 1) * s if edges is None else _whole(edges, b * s)
    geometry = _geometry(learned, segments, gpt.pg_collection.cp, cp_windows)

    def part(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.flatten()[geometry.positions.to(x.device)].view(b, -1)

    return MicroBatch(
        geometry,
        tokens=part(tokens),
        position_ids=None if tokens is None else part(batch["position_ids"]),
        labels=None if labels is None else geometry.part(learned),
        attention_mask=batch.get("attention_mask"),
        packed_seq_params=packed,
    )


def _learned(labels: Tensor, mask: Tensor) -> Tensor:
    if not ((mask == 0) | (mask == 1)).all():
        raise UserError(
            f"the loss mask has values between {float(mask.min()):g} and {float(mask.max()):g}: the objective weighs "
            f"tokens itself, so mark what is learned by 1 and all else by 0"
        )
    return labels.masked_fill(mask == 0, IGNORE_INDEX)


def _whole(edges: Tensor, n: int) -> Tensor:
    """Return edges [B + 1] that end at n: what is after the last sample is a segment of its own, without labels."""
    return edges if int(edges[-1]) == n else torch.cat([edges, edges.new_tensor([n])])


def _geometry(
    labels: Tensor, edges: Tensor, cp_group: dist.ProcessGroup, cp_windows: Literal["per_rank", "exact"]
) -> Geometry:
    n = len(edges) - 1
    segments = Geometry(labels.flatten(), edges, torch.ones(n, dtype=torch.bool), torch.ones(n), cp_group, cp_windows)
    return replace(segments, counted=segments.n > 0)
