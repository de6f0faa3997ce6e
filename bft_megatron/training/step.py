"""Megatron's GPT training step with the objective on the last pipeline stage.

Every rank reads its micro-batch itself and runs the model. On the last stage `GPTModel`'s own hook, `output_processor`,
turns hidden states into log p of the labels, and the loss function returns the three parts that Megatron expects: this
rank's sum, its count and a report. With `calculate_per_token_loss` Megatron all-reduces the count over data x context
parallelism and divides once, so the gradient is that of one process with the whole global batch. The loss itself is
defined in `objective`; `reporting` writes the reports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch import Tensor

from bft_megatron.errors import FieldError
from bft_megatron.objective.lookup import lookup
from bft_megatron.objective.loss import objective_sum
from bft_megatron.objective.records import Objective, lowest_confidence, without_window
from bft_megatron.recipe.schema import ObjectiveSettings
from bft_megatron.training.batch import Batch, MicroBatch
from bft_megatron.training.head import Head
from bft_megatron.training.measuring import Measure, Measured

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]
Report = Callable[[Measured], dict[str, Tensor]]


class Step:
    """The functions that Megatron's loop calls, for one objective.

    Args:
        settings: the recipe's `objective:`.
        vocab_size: the model's true vocabulary, without Megatron's padding; None: all of the padded one.
        measure: called with every micro-batch of `forward` after its loss, on the last stage.
        mask_padding: tell the routers of a mixture of experts which tokens are padding.
    """

    def __init__(
        self,
        settings: ObjectiveSettings,
        vocab_size: int | None,
        measure: Measure = lambda batch, measured: None,
        *,
        mask_padding: bool = False,
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
            options=settings.options,
        )
        if unknown := self.objective.needs - {"entropy"}:
            names = ", ".join(sorted(unknown))
            raise FieldError("objective.name", f"{self.objective.name} needs {names}, which the step does not compute")

    def forward(
        self, data_iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module
    ) -> tuple[Tensor, LossFunction]:
        """Run one micro-batch of our data through this stage, as Megatron's `forward_step_func`; see `run`."""
        batch = Batch(**next(data_iterator))
        self.rows = batch.row.tolist() if model.training else []
        micro_batch = batch.micro_batch(self.settings, mask_padding=self.mask_padding)
        return self.run(micro_batch, model, partial(self._report, batch))

    def run(self, micro_batch: MicroBatch, model: torch.nn.Module, report: Report) -> tuple[Tensor, LossFunction]:
        """Run one micro-batch through this stage -> (output, loss function).

        Args:
            report: returns what Megatron reports of the micro-batch after its loss, on the last stage.
        """
        labels, head = micro_batch.labels, None
        if labels is not None:
            head = Head(self.settings, self.vocab_size, labels, entropy="entropy" in self.objective.needs)
        padding = micro_batch.padding
        output = model(
            _on_device(micro_batch.tokens),
            _on_device(micro_batch.position_ids),
            micro_batch.attention_mask,
            labels=_on_device(labels),
            packed_seq_params=micro_batch.packed_seq_params,
            output_processor=head,
            **({} if padding is None else {"padding_mask": _padding_mask(model, padding)}),
        )
        return output, lambda logp: self._loss(logp, micro_batch, head, report)

    def _loss(
        self, logp: Tensor, micro_batch: MicroBatch, head: Head | None, report: Report
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return (sum, count, report) of logp [b, s/cp] fp32, with gradients. Collectives: the objective's, over CP."""
        geometry = micro_batch.geometry
        assert geometry is not None, "a stage without labels has no loss"
        assert head is not None
        assert head.correct is not None, (
            "GPTModel did not call output_processor: this is not the release that is pinned"
        )
        logp = logp.flatten()
        view = geometry.view(logp, None if head.entropy is None else head.entropy.flatten())
        result = objective_sum(self.objective, geometry, view, logp)
        windows = (view, self.settings.group_size, self.settings.confidence)
        confidence, mean_alone = lowest_confidence(*windows), without_window(*windows)
        correct = head.correct.flatten()
        measured = Measured(self.objective, geometry, view, result, confidence, mean_alone, correct)
        count = torch.tensor(result.count, dtype=torch.int, device=logp.device)
        return result.loss, count, report(measured)

    def _report(self, batch: Batch, measured: Measured) -> dict[str, Tensor]:
        self.measure(batch, measured)
        loss = measured.result.loss.detach()
        return {"loss": torch.stack((loss, loss.new_tensor(measured.result.count)))}


def _on_device(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.cuda(non_blocking=True)


def _padding_mask(model: torch.nn.Module, padding: Tensor) -> Tensor:
    """Return `GPTModel`'s `padding_mask`, True at padding, from that of this context-parallel rank's tokens [b, s/cp].

    Under sequence parallelism the first stage cuts it as it cuts the tokens; the other stages expect a rank's part.
    """
    gpt = unwrap_model(model)
    if gpt.config.sequence_parallel and not gpt.pre_process:
        size, rank = dist.get_world_size(gpt.pg_collection.tp), dist.get_rank(gpt.pg_collection.tp)
        padding = padding.chunk(size, dim=1)[rank]
    return padding.cuda(non_blocking=True)
