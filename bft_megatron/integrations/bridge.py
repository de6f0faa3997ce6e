"""The objective in Megatron-Bridge's loop: `BftForwardStep` in place of the `forward_step` of its `gpt_step`.

    finetune(config=config, forward_step_func=BftForwardStep("bft", group_size=256))

It reads the batches of Bridge's fine-tuning data sets, padded and packed ones, on every pipeline stage and under tensor
or context parallelism, and runs them through the `Step` of this package's own loop. Bridge is imported when
the first batch is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model
from torch import Tensor

from bft_megatron.errors import UserError
from bft_megatron.integrations.loop_step import LoopStep
from bft_megatron.integrations.reports import checked, sums
from bft_megatron.integrations.rows import micro_batch
from bft_megatron.training.step import LossFunction


class BftForwardStep(LoopStep):
    """A `forward_step_func` for Megatron-Bridge's `finetune` and `pretrain`; its arguments are those of `LoopStep`."""

    def __call__(
        self,
        state: Any,
        data_iterator: Iterator[dict[str, Any]] | None,
        model: torch.nn.Module,
        return_schedule_plan: bool = False,
    ) -> tuple[Tensor, LossFunction]:
        """Run one micro-batch through this stage -> (output, loss function).

        Args:
            state: Bridge's `GlobalState`, which its loop passes by this argument's name.
            data_iterator: yields whole rows, on every rank.
            model: a `GPTModel`, wrapped or not.
            return_schedule_plan: not supported.

        Collectives: the model's and the step's.

        Raises:
            UserError: the run has an option with which the loss would be wrong, or the batch is not one of a
                fine-tune.
        """
        gpt = unwrap_model(model)
        if return_schedule_plan:
            raise UserError(
                "comm_overlap.overlap_moe_expert_parallel_comm asks for a schedule plan, which BftForwardStep does "
                "not make"
            )
        if not self.is_checked:
            check(state.cfg, gpt)
            self.is_checked = True
        state.timers("batch-generator", log_level=2).start()
        with state.straggler_timer(bdata=True):
            batch = read(data_iterator, state.cfg, gpt)
            edges = physical_edges(batch)
            own = micro_batch(batch, edges, gpt, self.step.settings.cp_windows)
        state.timers("batch-generator").stop()
        count_operations(state, batch.get("tokens"), edges, gpt)
        with state.straggler_timer:
            output, function = self.step.run(own, model, sums)
        wanted = state.cfg.rerun_state_machine
        return output, checked(function, not_finite=wanted.check_for_nan_in_loss, spiky=wanted.check_for_spiky_loss)


def check(config: Any, gpt: Any) -> None:
    """Raise UserError for a model or an option with which the objective would be wrong.

    Args:
        config: Bridge's `ConfigContainer`.
        gpt: the model without its wrappers.
    """
    if not isinstance(gpt, GPTModel):
        raise UserError(f"BftForwardStep runs a GPTModel, not a {type(gpt).__name__}")
    faults = {
        "model.calculate_per_token_loss is off: Bridge would average the micro-batches' means; set it to True, and "
        "ddp.average_in_collective to False": not gpt.config.calculate_per_token_loss,
        "ddp.average_in_collective averages gradients over ranks, which the number of samples already does; set it to "
        "False": config.ddp.average_in_collective,
        "multi-token prediction has a loss of its own, which is not part of the objective; set model.mtp_num_layers "
        "to None": bool(gpt.config.mtp_num_layers),
        "attention masks of the data set are not split over context-parallel ranks; set "
        "dataset.skip_getting_attention_mask_from_dataset to True": not without_masks(config)
        and gpt.config.context_parallel_size > 1,
    }
    for fault, found in faults.items():
        if found:
            raise UserError(fault)


def read(data_iterator: Iterator[dict[str, Any]] | None, config: Any, gpt: Any) -> dict[str, Any]:
    """Return a micro-batch as Bridge's data sets make it, whole rows on the GPU, before it is split over contexts.

    A stage gets what it needs alone: one in the middle the edges of packed rows and the attention mask, if any, and
    nothing where it has no data.
    """
    if data_iterator is None:
        return {}
    from megatron.bridge.training.gpt_step import get_batch_from_iterator

    batch: dict[str, Any] = get_batch_from_iterator(
        data_iterator,
        skip_getting_attention_mask_from_dataset=without_masks(config),
        is_first_pp_stage=gpt.pre_process,
        is_last_pp_stage=gpt.post_process,
    )
    return batch


def without_masks(config: Any) -> bool:
    """Return whether the data set makes no attention masks, as those of Bridge's fine-tunes."""
    return bool(getattr(config.dataset, "skip_getting_attention_mask_from_dataset", True))


def physical_edges(batch: dict[str, Any]) -> Tensor | None:
    """Return the edges [B + 1] of a packed row's segments with their padding, on the CPU; None for padded rows.

    Bridge has two spellings: Megatron-Core's names, where rows with fewer segments repeat their last edge, and the
    older `cu_seqlens`, filled up with -1 from `cu_seqlens_argmin` on.

    Raises:
        UserError: a micro-batch has several packed rows.
    """
    names = ("cu_seqlens_q_padded", "cu_seqlens_q", "cu_seqlens")
    given: Tensor | None = next((batch[name] for name in names if batch.get(name) is not None), None)
    if given is None:
        return None
    if given.dim() > 1 and len(given) > 1:
        raise UserError(f"a micro-batch has {len(given)} packed rows: set train.micro_batch_size to 1")
    edges = given.flatten().cpu()
    distinct: Tensor = torch.unique_consecutive(edges[edges >= 0])
    return distinct


def count_operations(state: Any, tokens: Tensor | None, edges: Tensor | None, gpt: Any) -> None:
    """Add the micro-batch to what Bridge logs of floating-point operations, as its own step does.

    Under context parallelism that takes a packed row for one sample.
    """
    from megatron.bridge.training.utils.flop_utils import accumulate_flops_metadata

    alone = gpt.pg_collection.cp.size() == 1
    accumulate_flops_metadata(
        state,
        tokens,
        vp_stage=gpt.vp_stage,
        config_seq_len=gpt.config.seq_length,
        cu_seqlens=None if edges is None or tokens is None or not alone else edges.to(tokens.device),
    )
