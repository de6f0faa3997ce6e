"""The objective in Megatron-Bridge's loop: a forward step for its `finetune` and `pretrain`.

    finetune(config, forward_step_func=BftForwardStep("bft", group_size=256))

It reads the batches of Megatron-Bridge's data sets, padded and packed, and runs them through the `Step` of this
package's own loop. Written for Megatron-Bridge 0.6, which is imported when the step is first called.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model
from torch import Tensor

from bft_megatron.errors import UserError
from bft_megatron.integrations.reports import checked, sums
from bft_megatron.integrations.rows import micro_batch
from bft_megatron.integrations.settings import objective_settings
from bft_megatron.training.step import LossFunction, Step


class BftForwardStep:
    """A forward step for Megatron-Bridge, with the loss of one objective.

    Args:
        objective: "bft", "dft", "sft", or a record of your own as "package.module:attribute".
        vocab_size: the model's true vocabulary, without Megatron's padding; None takes the padding for part of the
            vocabulary, as Megatron's own loss does.
        settings: the other fields of a recipe's `objective:` by name.

    A sample is a row, or a packed row's segment, with at least one token in the loss mask. For a mean over samples
    `num_tokens` of Bridge's loop is the number of samples. Each call copies labels and loss mask to the CPU, which
    waits for the GPU.

    Raises:
        FieldError: a setting is not what a recipe may have.
    """

    def __init__(self, objective: str = "bft", *, vocab_size: int | None = None, **settings: Any) -> None:
        self.step = Step(objective_settings(objective, settings), vocab_size)
        self._is_checked = False

    def __call__(
        self,
        state: Any,
        data_iterator: Iterator[dict[str, Tensor]],
        model: torch.nn.Module,
        return_schedule_plan: bool = False,
    ) -> tuple[Tensor, LossFunction]:
        """Run one micro-batch through this stage -> (output, loss function).

        Args:
            state: Bridge's `GlobalState`.
            data_iterator: yields whole rows on every rank that needs them.
            model: a `GPTModel`, wrapped or not.
            return_schedule_plan: not supported.

        Raises:
            UserError: the run has an option with which the loss would be wrong, or the batch is not one of a
                fine-tune.
        """
        from megatron.bridge.training.utils.flop_utils import accumulate_flops_metadata, get_model_chunk_vp_stage
        from megatron.bridge.training.utils.packed_seq_utils import get_packed_seq_params
        from megatron.bridge.training.utils.pg_utils import get_pg_collection

        gpt = unwrap_model(model)
        if return_schedule_plan:
            raise UserError(
                "overlap_moe_expert_parallel_comm asks for a schedule plan, which there is none of; unset it"
            )
        if not self._is_checked:
            check(gpt)
            self._is_checked = True
        groups = get_pg_collection(model)
        state.timers("batch-generator", log_level=2).start()
        with state.straggler_timer(bdata=True):
            batch = read(data_iterator, state.cfg, gpt)
        packed = {name: batch[name] for name in METADATA if batch.get(name) is not None}
        params = get_packed_seq_params(packed) if packed else None
        edges = None if params is None else params.cu_seqlens_q_padded
        edges = params.cu_seqlens_q if params is not None and edges is None else edges
        own = micro_batch(
            tokens=batch.get("tokens") if gpt.pre_process else None,
            position_ids=batch.get("position_ids") if gpt.pre_process else None,
            labels=batch.get("labels") if gpt.post_process else None,
            loss_mask=batch.get("loss_mask"),
            attention_mask=batch.get("attention_mask"),
            edges=edges,
            packed_seq_params=params,
            cp_group=groups.cp,
            cp_windows=self.step.settings.cp_windows,
        )
        state.timers("batch-generator").stop()
        accumulate_flops_metadata(
            state,
            own.tokens,
            vp_stage=get_model_chunk_vp_stage(model),
            config_seq_len=gpt.config.seq_length if hasattr(gpt.config, "seq_length") else None,
            cu_seqlens=edges if groups.cp.size() == 1 else None,
        )
        with state.straggler_timer:
            output, function = self.step.run(own, model, sums)
        found = state.cfg.rerun_state_machine
        return output, checked(function, not_finite=found.check_for_nan_in_loss, spiky=found.check_for_spiky_loss)


METADATA = (
    *("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded", "max_seqlen_q", "max_seqlen_kv"),
    *("cu_seqlens", "cu_seqlens_argmin", "cu_seqlens_unpadded", "cu_seqlens_unpadded_argmin", "max_seqlen"),
)
"""What Bridge's batches say of a packed row, in its present and its earlier spelling."""


def check(gpt: Any) -> None:
    """Raise UserError for a model or an option with which the objective would be wrong.

    Args:
        gpt: the model without its wrappers.
    """
    if not isinstance(gpt, GPTModel):
        raise UserError(f"BftForwardStep runs a GPTModel, not a {type(gpt).__name__}")
    if not gpt.config.calculate_per_token_loss:
        raise UserError(
            "model.calculate_per_token_loss is off: Megatron would average the micro-batches' means; set it to True"
        )
    if gpt.config.mtp_num_layers:
        raise UserError(
            "multi-token prediction has a loss of its own, which is not part of the objective; "
            "set model.mtp_num_layers to None"
        )


def read(data_iterator: Iterator[dict[str, Tensor]], config: Any, gpt: Any) -> dict[str, Any]:
    """Return a micro-batch on the GPU as Bridge reads it, whole rows, before it is split over contexts.

    A stage that neither embeds nor has labels gets the metadata of packed rows alone, or nothing.
    """
    from megatron.bridge.training.gpt_step import get_batch_from_iterator

    packed = getattr(config.dataset, "enable_offline_packing", False) or getattr(
        config.dataset, "enable_in_batch_packing", False
    )
    if not (gpt.pre_process or gpt.post_process or packed):
        return {}
    batch: dict[str, Any] = get_batch_from_iterator(
        data_iterator,
        skip_getting_attention_mask_from_dataset=getattr(
            config.dataset, "skip_getting_attention_mask_from_dataset", True
        ),
        is_first_pp_stage=gpt.pre_process,
        is_last_pp_stage=gpt.post_process,
    )
    return batch
