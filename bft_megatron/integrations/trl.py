"""The objectives in TRL's `SFTTrainer`, over the log-probabilities of its fused head.

TRL's own loss and metrics are computed by TRL. This module only puts the objective's sum in the place of the sum of log
p, and the objective's divisor in the place of the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from trl import SFTTrainer

from bft_megatron.errors import UserError
from bft_megatron.hf.samples import batch_geometry, divisor
from bft_megatron.objective import records
from bft_megatron.objective.loss import objective_sum
from bft_megatron.objective.records import Objective
from bft_megatron.objective.view import Geometry

HERE = "BftSFTTrainer"


class BftSFTTrainer(SFTTrainer):
    """TRL's `SFTTrainer` with an objective of `bft_megatron.objective.records`, by default BFT.

    Its arguments are those of `SFTTrainer`, and `objective`. The loss of an optimizer step is the objective's sum over
    all micro-batches and processes, divided by their samples, or by their supervised tokens if the objective is a mean
    over tokens. In packed and padding-free rows the samples are told apart by the position ids. A sample without
    supervised tokens is not counted.

    Collectives: one all-gather of the divisor for each optimizer step, and TRL's own.

    Raises:
        UserError: the arguments ask for another loss, for rows whose samples cannot be told apart, or for sequences
            that are split over processes.
    """

    def __init__(self, *args: Any, objective: Objective = records.bft, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check(self, objective)
        self.objective: Objective = objective
        self.model_accepts_loss_kwargs = True  # the loss is divided here, whatever the model can do

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Tensor]:
        """Return the micro-batches of a step and the divisor over all processes."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        count = torch.tensor(divisor(self.objective, batches), device=self.args.device)
        if self.args.average_tokens_across_devices:
            count = self.accelerator.gather(count).sum() // self.get_tp_size()
        return batches, count

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the objective's loss of a micro-batch; without `num_items_in_batch` the mean over it."""
        geometry = batch_geometry(inputs["labels"], inputs.get("position_ids"))

        def weighed(*args: Any, **kwargs: Any) -> Any:
            outputs = model(*args, **kwargs)
            if kwargs.get("fused_lm_head"):
                outputs.log_probs = self._instead_of_log_probs(outputs, geometry, num_items_in_batch is None)
            return outputs

        return super().compute_loss(weighed, inputs, return_outputs, num_items_in_batch)

    def _instead_of_log_probs(self, outputs: Any, geometry: Geometry, own_divisor: bool) -> Tensor:
        """Return minus the objective's sum, a scalar, which TRL negates and divides by the number of items.

        With `own_divisor` TRL divides by this batch's tokens, which is corrected to the objective's divisor.
        """
        logp = torch.nn.functional.pad(outputs.log_probs.float(), (0, 1)).flatten()
        entropy = torch.nn.functional.pad(outputs.entropy.float(), (0, 1)).flatten()
        total = objective_sum(self.objective, geometry, geometry.view(logp, entropy), logp)
        tokens: Tensor = outputs.label_mask.sum()
        return -total.loss * tokens / max(total.count, 1) if own_divisor else -total.loss


def _check(trainer: Any, objective: Objective) -> None:
    """Raise a UserError if the trainer's arguments do not fit the objective."""
    for fault in _faults(trainer, objective):
        raise UserError(fault, HERE)


def _faults(trainer: Any, objective: Objective) -> Iterator[str]:
    args, split = trainer.args, trainer.accelerator.parallelism_config
    if objective.needs - {"entropy"}:
        yield f"objective {objective.name!r} needs {sorted(objective.needs)}, which TRL's head does not give"
    if args.loss_type != "nll":
        yield f"loss_type={args.loss_type!r} is a loss of TRL's own; leave it out and pass objective="
    if trainer.compute_loss_func is not None:
        yield "compute_loss_func would replace the objective; leave it out"
    if args.label_smoothing_factor:
        yield "label_smoothing_factor would replace the objective; leave it out"
    if (args.packing or args.eval_packing) and args.packing_strategy == "wrapped":
        yield "packing_strategy='wrapped' cuts samples and gives no position ids; use 'bfd'"
    if split is not None and (split.cp_enabled or split.sp_enabled):
        yield "context and sequence parallelism split a sample's tokens over processes; switch them off"
