"""The objectives as loss functions of unsharded logits, for transformers' `Trainer(compute_loss_func=...)`.

This module only shifts the labels, describes a padded batch and divides. The formulas are in `bft_megatron.objective`.
A function of logits and labels sees neither the samples of a packed row nor the other micro-batches: `exact_trainer.py`
has a Trainer that does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bft_megatron.errors import FieldError
from bft_megatron.labels import IGNORE_INDEX
from bft_megatron.objective import records
from bft_megatron.objective.logprobs import vocab_parallel_logprobs
from bft_megatron.objective.lookup import lookup
from bft_megatron.objective.loss import LossSum, objective_sum
from bft_megatron.objective.records import Confidence, Objective, Reduce
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
        outputs: a model's output, with `logits` [b, s, v] of any floating dtype; they are only read. Without logits
            its `loss` is returned, or 0 if it has none.
        labels: [b, s or more] int64, not shifted, -100 where not supervised; of what they have more than the logits,
            only the first is used, the label of the last position.
        num_items_in_batch: accepted because the Trainer passes it, and not used: it counts tokens, and the mean is over
            samples. The Trainer sums what its micro-batches and processes return, so their means are summed, not
            averaged; `exact_trainer.BftTrainer` divides by the samples of the whole step.
        group_size: supervised tokens of a confidence window; default BFT_GROUP_SIZE, else 256.
        gamma: exponent of the confidence; default BFT_CONF_GAMMA, else 1.
        confidence: "geometric" or "arithmetic", as in `records.lowest_confidence`.

    Raises:
        UserError: a setting is out of range.
    """
    group_size = environment.group_size() if group_size is None else group_size
    gamma = environment.gamma() if gamma is None else gamma
    return _loss(records.balanced(group_size, gamma, confidence), outputs, labels, num_items_in_batch)


def dft_loss_func(
    outputs: Mapping[str, Tensor],
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    *,
    group_size: int | None = None,
    gamma: float | None = None,
    confidence: Confidence = "geometric",
) -> Tensor:
    """Return the DFT loss of a batch, a scalar fp32: the sum over supervised tokens divided by their number.

    Args:
        outputs, labels: as in `bft_loss_func`.
        num_items_in_batch: the divisor in place of the batch's own count: the number of supervised tokens in the
            whole global batch.
        group_size, gamma, confidence: not used; accepted so that this function can replace `bft_loss_func`.
    """
    return _loss(records.dft, outputs, labels, num_items_in_batch)


def loss_func(
    name: str,
    *,
    group_size: int | None = None,
    gamma: float | None = None,
    confidence: Confidence = "geometric",
    reduce: Reduce | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Tensor]:
    """Return the loss function of any objective, with the arguments of `bft_loss_func`.

    Args:
        name: an objective as a recipe names it.
        group_size, gamma, confidence: as for `bft_loss_func`, for the objectives that have them.
        reduce: replaces the objective's own kind of mean.
        options: the objective's options.

    A mean over tokens divides by `num_items_in_batch` where the Trainer gives it, as `dft_loss_func` does; a mean over
    samples by the batch's rows, as `bft_loss_func` does.

    Raises:
        FieldError: there is no such objective, or a setting is not one of its own.
    """
    objective = lookup(
        name,
        group_size=environment.group_size() if group_size is None else group_size,
        gamma=environment.gamma() if gamma is None else gamma,
        confidence=confidence,
        reduce=reduce,
        options=options,
    )
    if objective.needs:
        raise FieldError("objective.name", f"{name} needs {', '.join(sorted(objective.needs))}: use BftTrainer")

    def compute(
        outputs: Mapping[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        return _loss(objective, outputs, labels, num_items_in_batch)

    return compute


def _loss(
    objective: Objective, outputs: Mapping[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | int | None
) -> Tensor:
    if outputs.get("logits") is None:
        return _without_logits(outputs)
    total = batch_sum(objective, outputs["logits"], labels)
    given = None if objective.reduce == "samples" else num_items_in_batch
    items = total.count if given is None else given
    return total.loss / torch.as_tensor(items, device=total.loss.device).clamp(min=1)


def batch_sum(objective: Objective, logits: Tensor, labels: Tensor) -> LossSum:
    """Return the objective's sum and count over a batch: logits [b, s, v], labels [b, s or more], not shifted."""
    b, s = logits.shape[:2]
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)[:, :s]  # position i has token i + 1
    logp = vocab_parallel_logprobs(logits, shifted.to(logits.device)).flatten()
    geometry = Geometry(
        labels=shifted.flatten().cpu(),
        cu_seqlens=torch.arange(b + 1) * s,
        counted=torch.ones(b, dtype=torch.bool),
        weight=torch.ones(b),
    )
    return objective_sum(objective, geometry, geometry.view(logp), logp)


def _without_logits(outputs: Mapping[str, Tensor]) -> Tensor:
    """Return the model's own loss, as for a batch that another part of a model has already scored; else 0."""
    loss = outputs.get("loss")
    return torch.tensor(0.0) if loss is None else loss
