"""The loss that balances experts within each row, exact on every layout and with padding left out."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bft_megatron.upstream.change import Change

_TEST = "tests/training/test_balance.py"

ROW_LOSS = Change(
    "megatron.core.transformer.moe.router:TopKRouter._apply_seq_aux_loss",
    "replaced",
    "With a padding mask Megatron divides every row of a micro-batch by the mean of their lengths, multiplies each "
    "rank's part by its own number of tokens times the number of ranks, and divides 0 by 0 where all is padding: the "
    "gradient depends on the micro-batch, on context and sequence parallelism, and is NaN of a row without samples.",
    "Megatron's loss of a row is that of its own tokens",
    _TEST,
    ("self", "probs", "scores_for_aux_loss", "routing_map", "seq_length", "bsz", "with_padding_mask"),
)
SCALER = Change(
    "megatron.core.transformer.moe.moe_utils:MoEAuxLossAutoScaler",
    "internal",
    "It adds the gradient of the loss in the backward pass, times the scale that the schedule has set.",
    "Megatron has a public way to add a loss within the model",
    _TEST,
)
TRACKER = Change(
    "megatron.core.transformer.moe.moe_logging:get_moe_metrics_tracker",
    "internal",
    "Megatron's log of a step has the loss, as it has with Megatron's own function.",
    SCALER.until,
    _TEST,
)


def row_losses(scores: Tensor, chosen: Tensor, top: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return this rank's part of sum_rows n E sum_e f_e P_e, a scalar with gradient, and n of each row, [b].

    f_e is the share of a row's n tokens that is sent to expert e, divided by `top`, and P_e the mean of their scores.
    The losses of the ranks add up to the whole. One SUM all-reduce [b, E] over `group`.

    Args:
        scores: [s, b, E], of this rank's tokens; 0 at padding.
        chosen: [s, b, E], whether a token is sent to an expert; False at padding.
        top: experts that a token is sent to.
        group: the ranks that share the rows.
    """
    counts = chosen.sum(0, dtype=torch.float32)
    dist.all_reduce(counts, group=group)
    tokens = counts.sum(-1) / top
    shares = counts / (top * tokens.clamp(min=1)[:, None])  # a row without samples has neither counts nor scores
    return counts.shape[-1] * (shares * scores.sum(0)).sum(), tokens


def install() -> None:
    """Replace Megatron's `seq_aux_loss` by `row_losses` times its coefficient, a sum over tokens to be divided."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    def apply(
        self: Any,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        seq_length: int,
        bsz: int,
        with_padding_mask: bool = False,
    ) -> Tensor:
        shape = (seq_length, bsz, self.num_experts)
        loss, tokens = row_losses(scores_for_aux_loss.view(shape), routing_map.view(shape), self.topk, self.tp_cp_group)
        get_moe_metrics_tracker().record(
            "seq_load_balancing_loss",
            loss.detach() / tokens.sum().clamp(min=1),
            self.layer_number,
            self.config.num_layers,
            reduce_group=self.tp_cp_group,
        )
        coefficient = self.get_aux_loss_coeff("seq_aux_loss")
        balanced: Tensor = MoEAuxLossAutoScaler.apply(probs, coefficient * loss)
        return balanced

    ROW_LOSS.put(apply)
