"""Megatron's GPT training step with the objective on the last pipeline stage.

Every rank reads its micro-batch itself and runs the model. On the last stage `GPTModel`'s own hook, `output_processor`,
turns hidden states into log p of the labels, and the loss function returns the three parts that Megatron expects: this
rank's sum, its count and a report. With `calculate_per_token_loss` Megatron all-reduces the count over data x context
parallelism and divides once, so the gradient is that of one process with the whole global batch. The loss itself is
defined in `objective`; `reporting` writes the reports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import unwrap_model
from torch import Tensor

from bft_megatron.data.columns import Columns
from bft_megatron.errors import FieldError
from bft_megatron.objective.loss import objective_sum
from bft_megatron.objective.records import Objective, lookup, lowest_confidence, without_window
from bft_megatron.objective.view import Geometry
from bft_megatron.recipe.schema import ObjectiveSettings
from bft_megatron.training.head import Head
from bft_megatron.training.measuring import Measure, Measured

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


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

    def packed_seq_params(self) -> PackedSeqParams | None:
        """Return what rotary embedding and attention need of a packed row, on every stage; None for padded rows."""
        if self.cu_seqlens is None or self.max_seqlen is None:
            return None
        edges, longest = self.edges.cuda(non_blocking=True), int(self.max_seqlen)
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=edges,
            cu_seqlens_kv=edges,
            # Padding is at a sample's end, after every query that counts, so the padded edges serve for both.
            cu_seqlens_q_padded=edges,
            cu_seqlens_kv_padded=edges,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )


class Step:
    """The functions that Megatron's loop calls, for one objective.

    Args:
        settings: the recipe's `objective:`.
        vocab_size: the model's true vocabulary, without Megatron's padding.
        measure: called with every micro-batch after its loss, on the last stage.
        mask_padding: tell the routers of a mixture of experts which tokens are padding.
    """

    def __init__(
        self, settings: ObjectiveSettings, vocab_size: int, measure: Measure, *, mask_padding: bool = False
    ) -> None:
        self.settings, self.vocab_size, self.measure, self.mask_padding = settings, vocab_size, measure, mask_padding
        self.rows: list[int] = []
        """The rows of the last training micro-batch, for the report of a run that fails."""
        self.objective: Objective = lookup(
            settings.name,
            group_size=settings.group_size,
            gamma=settings.gamma,
            confidence=settings.confidence,
            reduce=settings.reduce,
        )
        if unknown := self.objective.needs - {"entropy"}:
            names = ", ".join(sorted(unknown))
            raise FieldError("objective.name", f"{self.objective.name} needs {names}, which the step does not compute")

    def forward(
        self, data_iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module
    ) -> tuple[Tensor, LossFunction]:
        """Run one micro-batch through this stage, as Megatron's `forward_step_func` -> (output, loss function)."""
        batch = Batch(**next(data_iterator))
        self.rows = batch.row.tolist() if model.training else []
        geometry = batch.geometry(self.settings.cp_windows)
        b = len(batch.tokens)

        def mine(x: Tensor) -> Tensor:  # [b, s] -> [b, s/cp], this context-parallel rank's part
            return x.flatten()[geometry.positions].view(b, -1)

        labels = mine(batch.labels)
        head = Head(self.settings, self.vocab_size, labels, entropy="entropy" in self.objective.needs)
        output = model(
            mine(batch.tokens).cuda(non_blocking=True),
            mine(batch.position_ids).cuda(non_blocking=True),
            None,  # attention is causal within each sample
            labels=labels.cuda(non_blocking=True),
            packed_seq_params=batch.packed_seq_params(),
            output_processor=head,
            **({"padding_mask": _padding_mask(model, mine(batch.padding))} if self.mask_padding else {}),
        )
        return output, lambda logp: self._loss(logp, geometry, head, batch)

    def _loss(
        self, logp: Tensor, geometry: Geometry, head: Head, batch: Batch
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return (sum, count, report) of logp [b, s/cp] fp32, with gradients. Collectives: the objective's, over CP."""
        assert head.correct is not None, (
            "GPTModel did not call output_processor: this is not the release that is pinned"
        )
        logp = logp.flatten()
        view = geometry.view(logp, None if head.entropy is None else head.entropy.flatten())
        result = objective_sum(self.objective, geometry, view, logp)
        windows = (view, self.settings.group_size, self.settings.confidence)
        confidence, mean_alone = lowest_confidence(*windows), without_window(*windows)
        correct = head.correct.flatten()
        self.measure(Measured(self.objective, batch, geometry, view, result, confidence, mean_alone, correct))
        count = torch.tensor(result.count, dtype=torch.int, device=logp.device)
        report = {"loss": torch.stack((result.loss.detach(), count.float()))}
        return result.loss, count, report


def _padding_mask(model: torch.nn.Module, padding: Tensor) -> Tensor:
    """Return `GPTModel`'s `padding_mask`, True at padding, from that of this context-parallel rank's tokens [b, s/cp].

    Under sequence parallelism the first stage cuts it as it cuts the tokens; the other stages expect a rank's part.
    """
    gpt = unwrap_model(model)
    if gpt.config.sequence_parallel and not gpt.pre_process:
        size, rank = dist.get_world_size(gpt.pg_collection.tp), dist.get_rank(gpt.pg_collection.tp)
        padding = padding.chunk(size, dim=1)[rank]
    return padding.cuda(non_blocking=True)
