"""The part that the forward steps for Megatron-LM's and Megatron-Bridge's loops share."""

from __future__ import annotations

from typing import Any

from bft_megatron.integrations.settings import objective_settings
from bft_megatron.training.step import Step


class LoopStep:
    """The step of one objective, for another loop's batches.

    Args:
        objective: "bft", "dft", "sft", another name of a recipe, or a record of your own as "package.module:attribute".
        vocab_size: the model's true vocabulary, without Megatron's padding; None takes the padding for part of the
            vocabulary, as Megatron's own loss does.
        settings: the other fields of a recipe's `objective:` by name: options, group_size, gamma, confidence, reduce,
            cp_windows, head, chunk_size, kernels.

    A sample is a row, or a packed row's segment, with at least one token in the loss mask. For a mean over samples
    `num_tokens` of the loop is the number of samples. The option for a fused cross entropy is without effect: the head
    is this package's. Each call copies labels and loss mask to the CPU, which waits for the GPU.

    Raises:
        FieldError: a setting is not what a recipe may have.
    """

    def __init__(self, objective: str = "bft", *, vocab_size: int | None = None, **settings: Any) -> None:
        self.step = Step(objective_settings(objective, settings), vocab_size)
        self.is_checked = False
        """Whether the run's options have been looked at, on the first call."""
