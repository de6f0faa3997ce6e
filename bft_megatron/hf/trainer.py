"""The objectives as loss functions of unsharded logits, for transformers' `Trainer(compute_loss_func=...)`.

Only the adaptation is here: shifting the labels, describing a padded batch, dividing. The formula is objective/'s.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bft_megatron.labels import IGNORE_INDEX
from bft_megatron.objective import records
from bft_megatron.objective.logprobs import vocab_parallel_logprobs
from bft_megatron.objective.loss import LossSum, objective_sum
from bft_megatron.objective.records import Confidence, Objective
from bft_megatron.objective.view import Geometry
from bft_megatron.recipe import environment


def bft_loss_func(
    outputs: Mapping[str, Tensor],
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    *,
    group_size: int | None = None,
    gamma: float | None = None,
    confidence: Confidence = "geometric",
) -> Tensor:
    """Return the BFT loss of a batch, a scalar fp32: the mean over its samples.

    Args:
        outputs: a model's output, with `logits` [b, s, v] of any floating dtype; they are only read.
        labels: [b, s] int64, not shifted, -100 where not supervised.
        num_items_in_batch: taken for the Trainer's sake and not used: it counts tokens, and the mean is over samples.
            Trainer adds what its micro-batches and its processes return, so their means are summed, not averaged.
        group_size: supervised tokens of a confidence window; default BFT_GROUP_SIZE, else 256.
        gamma: exponent of the confidence; default BFT_CONF_GAMMA, else 1.
        confidence: "geometric" or "arithmetic", as in `records.lowest_confidence`.

    Raises:
        UserError: names the setting that makes no sense.
    """
    group_size = environment.group_size() if group_size is None else group_size
    gamma = environment.gamma() if gamma is None else gamma
    total = batch_sum(records.balanced(group_size, gamma, confidence), outputs["logits"], labels)
    return total.loss / max(total.count, 1)


def dft_loss_func(
    outputs: Mapping[str, Tensor],
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    *,
    group_size: int | None = None,
    gamma: float | None = None,
    confidence: Confidence = "geometric",
) -> Tensor:
    """Return the DFT loss of a batch, a scalar fp32: the sum over supervised tokens by their number.

    Args:
        outputs, labels: as in `bft_loss_func`.
        num_items_in_batch: the number to divide by in place of the batch's own: the supervised tokens of the whole
            global batch.
        group_size, gamma, confidence: BFT's, taken so that either function can stand in the other's place; not used.
    """
    total = batch_sum(records.dft, outputs["logits"], labels)
    items = total.count if num_items_in_batch is None else num_items_in_batch
    return total.loss / torch.as_tensor(items, device=total.loss.device).clamp(min=1)


def batch_sum(objective: Objective, logits: Tensor, labels: Tensor) -> LossSum:
    """logits [b, s, v], labels [b, s] not shifted -> the objective's sum and count over the batch."""
    b, s = labels.shape
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # [b, s], position i has token i + 1
    logp = vocab_parallel_logprobs(logits, shifted.to(logits.device)).flatten()
    geometry = Geometry(
        labels=shifted.flatten().cpu(),
        cu_seqlens=torch.arange(b + 1) * s,
        counted=torch.ones(b, dtype=torch.bool),
        weight=torch.ones(b),
    )
    return objective_sum(objective, geometry, geometry.view(logp), logp)
