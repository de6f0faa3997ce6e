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
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from bft_megatron.data.columns import Columns
from bft_megatron.errors import FieldError
from bft_megatron.objective.loss import LossSum, objective_sum
from bft_megatron.objective.records import Objective, lookup, lowest_confidence
from bft_megatron.objective.view import Geometry, View
from bft_megatron.recipe.schema import ObjectiveSettings
from bft_megatron.reporting.totals import Meter
from bft_megatron.training.head import Head

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

    @cached_property
    def source_of(self) -> Tensor:
        """Return the source of each sample, [B] int64."""
        return self.source if self.cu_seqlens is None else self.source.expand(len(self.edges) - 1)

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
        meter: the meter to which the step adds its sums.
    """

    def __init__(self, settings: ObjectiveSettings, vocab_size: int, meter: Meter) -> None:
        self.settings, self.vocab_size, self.meter = settings, vocab_size, meter
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
        )
        return output, lambda logp: self._loss(logp, geometry, head, batch)

    def _loss(
        self, logp: Tensor, geometry: Geometry, head: Head, batch: Batch
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return (sum, count, report) of logp [b, s/cp] fp32, with gradient. Collectives over CP: the objective's."""
        assert head.correct is not None, (
            "GPTModel did not call output_processor: this is not the release that is pinned"
        )
        logp = logp.flatten()
        view = geometry.view(logp, None if head.entropy is None else head.entropy.flatten())
        result = objective_sum(self.objective, geometry, view, logp)
        confidence = lowest_confidence(view, self.settings.group_size, self.settings.confidence)
        self.measure(result, view, confidence, geometry, head.correct, batch)
        count = torch.tensor(result.count, dtype=torch.int, device=logp.device)
        report = {"loss": torch.stack((result.loss.detach(), count.float()))}
        return result.loss, count, report

    def measure(
        self, result: LossSum, view: View, confidence: Tensor, geometry: Geometry, correct: Tensor, batch: Batch
    ) -> None:
        """Add this rank's part of the micro-batch to the meter: token sums, and on CP rank 0 alone sample sums."""
        device = confidence.device
        counted = geometry.counted.to(device, non_blocking=True)
        ours = counted if geometry.cp_rank == 0 else torch.zeros_like(counted)
        source = batch.source_of.to(device, non_blocking=True)

        def of_samples(x: Tensor, where: Tensor = source) -> Tensor:  # [B] -> [sources]
            return torch.zeros(self.meter.sources, dtype=torch.float64, device=device).index_add_(0, where, x.double())

        def of_tokens(x: Tensor) -> Tensor:  # [T] -> [sources]
            return of_samples(x, source[view.sample])

        tokens, samples = of_tokens(torch.ones_like(view.logp)), of_samples(ours)
        real = batch.real_tokens * (geometry.cp_rank == 0)
        self.meter.add(
            {
                "loss": of_tokens(result.token_loss),
                "divisor": tokens if self.objective.reduce == "tokens" else samples,
                "nll": of_tokens(-view.logp),
                "p": of_tokens(view.logp.double().exp()),
                "correct": of_tokens(geometry.take(correct.flatten())),
                "confidence": of_samples(torch.where(ours, confidence, 0.0)),
                "weight": of_samples(torch.where(ours, result.sample_weight, 0.0)),
                "samples": samples,
                "tokens": tokens,
                "real_tokens": of_samples(
                    real.to(device, non_blocking=True), batch.source.to(device, non_blocking=True)
                ),
            },
            torch.full((self.meter.sources,), torch.inf, dtype=torch.float64, device=device).scatter_reduce_(
                0, source, torch.where(counted, confidence, torch.inf).double(), "amin"
            ),
        )

    def finalize_grads(self, model: Any, num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        """Run Megatron's `finalize_model_grads`, then the meter's two all-reduces over data x context parallelism."""
        finalize_model_grads(model, num_tokens, **kwargs)
        self.meter.reduce(parallel_state.get_data_parallel_group(with_context_parallel=True))
