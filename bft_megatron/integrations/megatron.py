"""The objective in Megatron-LM's own loop: `ForwardStep` in place of the `forward_step` of `pretrain_gpt.py`.

    pretrain(config, provider, ModelType.encoder_or_decoder, ForwardStep("bft", group_size=256))

It reads the batches of Megatron-LM's data sets, padded ones and the packed ones of `--sft`, on every pipeline stage and
under tensor, sequence and context parallelism, and runs them through the `Step` of this package's own loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import flatten_batch_for_packed_sequences, get_batch_on_this_tp_rank, unwrap_model
from torch import Tensor

from bft_megatron.errors import UserError
from bft_megatron.integrations.loop_step import LoopStep
from bft_megatron.integrations.reports import checked, over_context, sums
from bft_megatron.integrations.rows import micro_batch
from bft_megatron.training.measuring import Measured
from bft_megatron.training.step import LossFunction

COLUMNS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
EDGES = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen")


class ForwardStep(LoopStep):
    """A `forward_step_func` for Megatron-LM's `pretrain`; its arguments are those of `LoopStep`."""

    def __call__(
        self, data_iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module, return_schedule_plan: bool = False
    ) -> tuple[Tensor, LossFunction]:
        """Run one micro-batch through this stage -> (output, loss function).

        Args:
            data_iterator: yields whole rows on tensor-parallel rank 0, which broadcasts them; None elsewhere.
            model: a `GPTModel`, wrapped or not.
            return_schedule_plan: not supported.

        Collectives: broadcasts of the batch over tensor parallelism, then the model's and the step's.

        Raises:
            UserError: the run has an option with which the loss would be wrong, or the batch is not one of a
                fine-tune.
        """
        from megatron.training import get_args, get_timers

        args, gpt = get_args(), unwrap_model(model)
        if return_schedule_plan:
            raise UserError(
                "overlap-moe-expert-parallel-comm asks for a schedule plan, which ForwardStep does not make"
            )
        if not self.is_checked:
            check(args, gpt)
            self.is_checked = True
        timers = get_timers()
        timers("batch-generator", log_level=2).start()
        batch = read(data_iterator, args, gpt)
        edges = batch.get("cu_seqlens_padded")
        edges = batch.get("cu_seqlens") if edges is None else edges
        own = micro_batch(batch, None if edges is None else edges[0], gpt, self.step.settings.cp_windows)
        timers("batch-generator").stop()
        # With --sft Megatron averages the validation's means of micro-batches and ranks. A rank of a context-parallel
        # group has no mean: it holds parts of samples.
        mean_of_means = args.sft and not model.training

        def report(measured: Measured) -> dict[str, Tensor]:
            found = sums(measured)
            return over_context(found, parallel_state.get_context_parallel_group()) if mean_of_means else found

        output, function = self.step.run(own, model, report)
        not_finite, spiky = args.check_for_nan_in_loss_and_grad, args.check_for_spiky_loss
        return output, checked(function, not_finite=not_finite, spiky=spiky)


def check(args: Any, gpt: Any) -> None:
    """Raise UserError for a model or an option with which the objective would be wrong; warn of `--sft`'s validation.

    Args:
        args: Megatron's global arguments.
        gpt: the model without its wrappers.
    """
    if not isinstance(gpt, GPTModel):
        raise UserError(f"ForwardStep runs a GPTModel, not a {type(gpt).__name__}")
    context, documents = args.context_parallel_size > 1, args.dataloader_inter_document_masking and not args.sft
    faults = {
        "--calculate-per-token-loss is off: Megatron would average the micro-batches' means; add the flag": (
            not gpt.config.calculate_per_token_loss
        ),
        "multi-token prediction has a loss of its own, which is not part of the objective; set --mtp-num-layers to 0": (
            bool(gpt.config.mtp_num_layers)
        ),
        "--hybrid-context-parallel splits rows in a way that the objective does not know; leave it out": (
            args.hybrid_context_parallel
        ),
        "--dataloader-inter-document-masking splits documents over context-parallel ranks at any token; use "
        "--context-parallel-size 1, or --sft": context and documents,
    }
    for fault, found in faults.items():
        if found:
            raise UserError(fault)
    if args.sft and torch.distributed.get_rank() == 0:
        print("--sft validates by a mean over micro-batches of their means, not over samples; training is exact")


def read(data_iterator: Iterator[dict[str, Tensor]], args: Any, gpt: Any) -> dict[str, Any]:
    """Return a micro-batch on the GPU as Megatron-LM's data sets make it, whole rows, before it is split over contexts.

    A stage that neither embeds nor has labels gets the edges of packed rows alone, or nothing. Rows of a packed
    micro-batch are joined to one. Collectives: broadcasts over tensor parallelism.
    """
    from megatron.training.training import update_seqlen_stats_from_cu_seqlens

    packed = args.sft or args.dataloader_inter_document_masking
    if not (gpt.pre_process or gpt.post_process or packed):
        return {}
    rank, batch = parallel_state.get_tensor_model_parallel_rank(), {}
    if rank == 0:
        given = next(data_iterator)
        batch = {name: None if given.get(name) is None else given[name].cuda() for name in (*COLUMNS, *EDGES)}
        if args.create_attention_mask_in_dataloader and batch["attention_mask"] is None:
            raise UserError(  # the other ranks would wait for it
                "the data set makes no attention mask: add --no-create-attention-mask-in-dataloader"
            )
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=packed,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
    )
    rows: dict[str, Any] = flatten_batch_for_packed_sequences(batch)
    if packed:
        update_seqlen_stats_from_cu_seqlens(rows["cu_seqlens"][0])
    return rows
