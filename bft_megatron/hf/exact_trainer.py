"""A transformers `Trainer` whose loss is the objective's over the whole step: all micro-batches, all processes.

Unlike a loss function, a Trainer sees the position ids, which tell the samples of a packed row apart, and can count the
samples of a step before it trains on the first of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from bft_megatron.errors import UserError
from bft_megatron.hf.chunked import chunked_statistics
from bft_megatron.hf.samples import batch_geometry, divisor
from bft_megatron.objective import records
from bft_megatron.objective.logprobs import vocab_parallel_statistics
from bft_megatron.objective.loss import objective_sum
from bft_megatron.objective.records import Objective
from bft_megatron.objective.view import Geometry

HERE = "BftTrainer"


class BftTrainer(Trainer):
    """transformers' `Trainer` with an objective of `bft_megatron.objective.records`, by default BFT.

    Its arguments are those of `Trainer`, and:

    objective: the objective.
    chunked: compute log p from the hidden states and the output layer's weight, without the logits.

    The loss of an optimizer step is the objective's sum over all micro-batches and processes, divided by their samples,
    or by their supervised tokens if the objective is a mean over tokens. With position ids in the batch, as collators
    of packed rows make them, the samples of a row are told apart. A sample without supervised tokens is not counted.

    Collectives: one all-gather of the divisor for each optimizer step, and those of `Trainer`.

    Raises:
        UserError: the arguments ask for another loss, or the output layer cannot be chunked.
    """

    loss_is_scaled_for_ga = True  # transformers from 5.20 divides a loss by the micro-batches otherwise

    def __init__(self, *args: Any, objective: Objective = records.bft, chunked: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective: Objective = objective
        self.chunked: bool = chunked
        for fault in _faults(self):
            raise UserError(fault, HERE)
        self.model_accepts_loss_kwargs = True  # older releases ask this before they divide

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Tensor]:
        """Return the micro-batches of a step and the divisor over all processes."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        count = torch.tensor(divisor(self.objective, batches), device=self.args.device)
        everyone: Tensor = self.accelerator.gather(count)
        return batches, everyone.sum()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the objective's loss of a micro-batch; without `num_items_in_batch` the mean over it."""
        geometry = batch_geometry(inputs["labels"], inputs.get("position_ids"))
        asked = {key: value for key, value in inputs.items() if key != "labels"}
        if self.chunked:
            with _scoring(_output_layer(self), geometry, "entropy" in self.objective.needs):
                outputs = model(**asked)
            logp, *entropies = outputs["logits"].flatten(0, 1).unbind(-1)
        else:
            outputs = model(**asked)
            logp, *entropies = _scored(outputs, geometry, "entropy" in self.objective.needs)
        total = objective_sum(self.objective, geometry, geometry.view(logp, *entropies), logp)
        if num_items_in_batch is None or not model.training:
            loss = total.loss / max(total.count, 1)
        else:  # DDP averages over the processes what is to be summed
            loss = total.loss / num_items_in_batch.clamp(min=1) * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


def _scored(outputs: Any, geometry: Geometry, entropy: bool) -> list[Tensor]:
    """Return log p of each position's label from the logits, and the entropy if asked for, each [b * s]."""
    logits = outputs.get("logits")
    if logits is None:
        raise UserError("the model returned no logits, as a fused loss does; switch it off, or use chunked=True", HERE)
    targets = geometry.labels.view(logits.shape[:2]).to(logits.device)
    found = vocab_parallel_statistics(logits, targets, entropy=entropy)
    return [x.flatten() for x in (found.logp, found.entropy) if x is not None]


def _output_layer(trainer: Trainer) -> Any:
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    return model.get_output_embeddings()


@contextmanager
def _scoring(layer: torch.nn.Linear, geometry: Geometry, entropy: bool) -> Iterator[None]:
    """Let the output layer return log p (and the entropy), [b, s, 1 or 2], in the place of the logits.

    That happens within the model's forward pass, where DDP and FSDP expect the weight to be used.
    """

    def score(hidden: Tensor) -> Tensor:
        found = chunked_statistics(hidden.to(layer.weight.dtype), layer.weight, geometry, entropy=entropy)
        return torch.stack([x for x in (found.logp, found.entropy) if x is not None], -1).view(*hidden.shape[:2], -1)

    layer.forward = score  # type: ignore  # of this instance, until the end
    try:
        yield
    finally:
        del layer.forward


def _faults(trainer: BftTrainer) -> Iterator[str]:
    args = trainer.args
    if args.use_liger_kernel:
        yield "use_liger_kernel computes a loss of its own without logits; leave it out and use chunked=True"
    if trainer.compute_loss_func is not None:
        yield "compute_loss_func would replace the objective; leave it out and pass objective="
    if args.label_smoothing_factor:
        yield "label_smoothing_factor is not part of the objective; leave it out"
    if trainer.chunked and (obstacle := _obstacle(trainer)):
        yield f"chunked=True cannot do {obstacle}; leave it out"


def _obstacle(trainer: Trainer) -> str | None:
    """Return what of the model only its logits show, or None."""
    model: Any = trainer.model
    layer: Any = _output_layer(trainer)
    config = model.config.get_text_config()
    if type(layer) is not torch.nn.Linear:
        return f"an output layer of the class {type(layer).__name__}"
    if getattr(layer, "bias", None) is not None:
        return "a bias of the output layer"
    scales = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
    return next((name for name in scales if getattr(config, name, None) not in (None, 1)), None)
