"""The model's head as `GPTModel.output_processor`: log p of the labels, with logits or without them.

`Head` chooses between the two paths for each micro-batch. The path without logits uses the output layer's weight
without calling the layer. It therefore runs the layer's pre-hooks itself and refuses, by name, what needs a call.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from bft_megatron.errors import FieldError
from bft_megatron.objective import tested_cards
from bft_megatron.objective.kernels import kernels, takes_triton
from bft_megatron.objective.linear_logprobs import vocab_parallel_linear_statistics
from bft_megatron.objective.logprobs import vocab_parallel_statistics
from bft_megatron.objective.sums import Statistics
from bft_megatron.recipe.schema import ObjectiveSettings
from bft_megatron.upstream import model_chunk

LOGITS_BYTES = 1 << 30
"""Bytes of a micro-batch's logits on a rank above which `objective.head: auto` computes without logits."""


class Head:
    """The `output_processor` of one micro-batch: hidden states -> log p of the labels; keeps the other statistics.

    Args:
        settings: the recipe's `objective:`.
        vocab_size: the model's true vocabulary; None: all of the padded one.
        labels: [b, s/cp] int64 on the CPU, the labels of this context-parallel rank.
        entropy: whether the objective needs the entropy.
    """

    def __init__(self, settings: ObjectiveSettings, vocab_size: int | None, labels: Tensor, entropy: bool) -> None:
        self.settings, self.vocab_size, self.wants_entropy = settings, vocab_size, entropy
        self.labels = labels.transpose(0, 1).contiguous()  # [s/cp, b]
        self.correct: Tensor | None = None
        """[b, s/cp] bool, whether the label is the argmax; None until the model has called."""
        self.entropy: Tensor | None = None
        """[b, s/cp] fp32 in nats; None unless the objective needs it."""

    def __call__(self, *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **_: Any) -> Tensor:
        """Compute log p [b, s/cp] fp32, 0 without a label, from hidden [s/cp (/tp under sequence parallelism), b, h].

        Collectives over TP: the output layer's, and those of the statistics (see `objective.logprobs` and
        `objective.linear_logprobs`).

        Raises:
            FieldError: `objective.head: chunked` with a model or a flag that needs a call of the output layer.
        """
        weight = output_layer.weight if output_weight is None else output_weight
        if self._without_logits(output_layer, weight):
            statistics = self._from_hidden(hidden_states, output_layer, weight)
        else:
            logits, _ = output_layer(hidden_states, weight=output_weight)  # [s/cp, b, v/tp]
            statistics = vocab_parallel_statistics(
                logits,
                self.labels.to(logits.device, non_blocking=True),
                group=parallel_state.get_tensor_model_parallel_group(),
                vocab_size=self.vocab_size,
                overwrite=True,  # nothing else reads the logits
                entropy=self.wants_entropy,
                kernels=kernels(self.settings.kernels, logits.device),
            )
        self.correct = statistics.correct.transpose(0, 1)
        self.entropy = None if statistics.entropy is None else statistics.entropy.transpose(0, 1)
        return statistics.logp.transpose(0, 1).contiguous()

    def _without_logits(self, output_layer: Any, weight: Tensor) -> bool:
        if self.settings.head == "logits":
            return False
        obstacle = _obstacle(output_layer, weight)
        if self.settings.head == "chunked" and obstacle:
            raise FieldError("objective.head", f"chunked cannot do {obstacle}; use logits")
        size = self.labels.numel() * weight.shape[0] * weight.element_size()
        return self.settings.head == "chunked" or (size > LOGITS_BYTES and not obstacle)

    def _from_hidden(self, hidden: Tensor, output_layer: Any, weight: Tensor) -> Statistics:
        # With `overlap-param-gather` Megatron waits for a parameter only in the hook that runs before its module.
        # Without this call the weight would be that of the previous step.
        model_chunk.run_pre_hooks(output_layer)
        return vocab_parallel_linear_statistics(
            hidden,
            weight,
            self.labels,
            group=parallel_state.get_tensor_model_parallel_group(),
            chunk_size=self.settings.chunk_size,
            sequence_parallel=output_layer.sequence_parallel,
            vocab_size=self.vocab_size,
            entropy=self.wants_entropy,
            fuse_main_grad=True,  # as Megatron's DDP expects, however the other layers compute theirs
            kernels=kernels(self.settings.kernels, hidden.device),
        )


def untested_card(settings: ObjectiveSettings) -> list[str]:
    """Return a sentence if `kernels: auto` takes torch's operators on this rank's GPU, else nothing."""
    device = torch.device("cuda")
    if settings.kernels != "auto" or takes_triton(settings.kernels, device):
        return []
    name = torch.cuda.get_device_name(device)
    return [tested_cards.torch_is_slower(name, torch.cuda.get_device_capability(device))]


def _obstacle(output_layer: Any, weight: Tensor) -> str | None:
    """Return the name of a feature of this output layer that only a call of it supports; None if it has none."""
    config = output_layer.config
    found = {
        f"an output layer of the class {type(output_layer).__name__}": type(output_layer) is not ColumnParallelLinear,
        "hooks or adapters on the output layer": model_chunk.has_hooks(output_layer) or list(output_layer.children()),
        "a bias of the output layer": output_layer.bias is not None,
        "use-mup, which scales the logits": getattr(config, "use_mup", False),
        "defer-embedding-wgrad-compute": config.defer_embedding_wgrad_compute,
        "cpu-offloading": getattr(config, "cpu_offloading", False),
        "GTP, which gathers the weight in the layer": getattr(output_layer, "gtp_remat_size", 1) > 1,
        "Megatron-FSDP": hasattr(weight, "__fsdp_param__") or hasattr(weight, "get_main_grad"),
        "disable_grad_reduce": output_layer.disable_grad_reduce,
        "autocast": torch.is_autocast_enabled(weight.device.type),
    }
    return next((name for name, true in found.items() if true), None)
