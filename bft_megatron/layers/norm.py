"""RMSNorm in plain torch, with the sequence parallelism that Megatron's own torch norm lacks."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, whose weight gradient `finalize_model_grads` sums over TP under sequence parallelism.

    With `layernorm_zero_centered_gamma` the factor is 1 + weight.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron's mark
        self.zero_centred = config.layernorm_zero_centered_gamma

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., h] -> [..., h]."""
        weight = 1 + self.weight if self.zero_centred else self.weight
        return torch.nn.functional.rms_norm(x, self.normalized_shape, weight, self.eps)
