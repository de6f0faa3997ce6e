"""Another trainer's rows as a micro-batch of the step.

Other trainers mark what is learned by a loss mask, and samples by the edges of packed rows. A sample is a segment of a
row with at least one supervised token; a padded row is one segment.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from bft_megatron.errors import UserError
from bft_megatron.labels import IGNORE_INDEX
from bft_megatron.objective.view import Geometry
from bft_megatron.training.batch import MicroBatch


def micro_batch(
    *,
    tokens: Tensor | None,
    position_ids: Tensor | None,
    labels: Tensor | None,
    loss_mask: Tensor | None,
    attention_mask: Tensor | None = None,
    edges: Tensor | None,
    packed_seq_params: PackedSeqParams | None,
    cp_group: dist.ProcessGroup,
    cp_windows: Literal["per_rank", "exact"],
) -> MicroBatch:
    """Return this context-parallel rank's part of whole rows.

    Args:
        tokens, position_ids: [b, s] int64; None on a stage that does not embed.
        labels: [b, s] int64, the next tokens; None on a stage without the output layer.
        loss_mask: [b, s], 1 where a label is learned and 0 elsewhere.
        attention_mask: [b, 1, s, s] bool, of padded rows without context parallelism.
        edges: [B + 1] int, the edges of the packed row's segments with their padding, b = 1; None for padded rows.
        packed_seq_params: what attention needs of the packed row.

    Copies labels and mask to the CPU: this waits once for the GPU.

    Raises:
        UserError: the loss mask has other values than 0 and 1.
    """
    rows = tokens if labels is None else labels
    if rows is None:  # a stage in the middle
        return MicroBatch(None, None, None, None, packed_seq_params=packed_seq_params)
    if labels is None or loss_mask is None:
        learned = torch.full(rows.shape, IGNORE_INDEX)
    else:
        learned = _learned(labels.cpu(), loss_mask.cpu())
    b, s = rows.shape
    segments = torch.arange(b + 1) * s if edges is None else _whole(edges.cpu(), b * s)
    geometry = _geometry(learned, segments, cp_group, cp_windows)

    def part(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.flatten()[geometry.positions.to(x.device)].view(b, -1)

    return MicroBatch(
        geometry,
        tokens=part(tokens),
        position_ids=part(position_ids),
        labels=None if labels is None else geometry.part(learned),
        attention_mask=attention_mask,
        packed_seq_params=packed_seq_params,
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
