"""The samples of a transformers batch: its rows, or the parts of packed rows; with what a mean divides by.

A packed batch ("padding free", "flattened") holds several samples in a row; its position ids start again at each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bft_megatron.labels import IGNORE_INDEX
from bft_megatron.objective.records import Objective
from bft_megatron.objective.view import Geometry


def batch_geometry(labels: Tensor, position_ids: Tensor | None = None) -> Geometry:
    """Return the geometry of a batch, on the CPU; a sample counts if any of its tokens is supervised.

    Args:
        labels: [b, s] int64, not shifted, IGNORE_INDEX where not supervised.
        position_ids: [b, s] or [1, s], for rows that may be packed: a sample begins where they do not go up by one.
            None: a row is a sample.

    The last token of a sample predicts nothing: a label that it would take from the next sample is left out.
    """
    labels = labels.cpu()
    starts = _starts(labels, position_ids)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # [b, s], position i has token i + 1
    shifted = shifted.flatten().masked_fill(starts.roll(-1), IGNORE_INDEX)
    edges = torch.cat([starts.nonzero()[:, 0], torch.tensor([len(starts)])])
    supervised_before = torch.nn.functional.pad((shifted != IGNORE_INDEX).cumsum(0), (1, 0))
    return Geometry(
        labels=shifted,
        cu_seqlens=edges,
        counted=supervised_before[edges].diff() > 0,
        weight=torch.ones(len(edges) - 1),
    )


def divisor(objective: Objective, batches: Iterable[Mapping[str, Any]]) -> int:
    """Return what the objective's mean over several batches divides by: their samples, or their supervised tokens."""
    shapes = [batch_geometry(batch["labels"], batch.get("position_ids")) for batch in batches]
    return sum(int((g.counted if objective.reduce == "samples" else g.supervised).sum()) for g in shapes)


def _starts(labels: Tensor, position_ids: Tensor | None) -> Tensor:
    """Return where samples begin, [b * s] bool."""
    starts = torch.zeros(labels.shape, dtype=torch.bool)
    if position_ids is not None:
        starts[:, 1:] = position_ids.cpu().diff(dim=-1) != 1
    starts[:, 0] = True
    return starts.flatten()
