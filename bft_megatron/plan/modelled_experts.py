"""A mixture's experts as one grouped product, for planning a GPU step: memory and work of Transformer Engine's layers.

The matrices of a rank's experts are one parameter, so that a layer of many experts is traced as fast as of one.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from bft_megatron.plan.kernels import OPS, kernel

MODELLED = {
    "experts' products": "keep their input; the gradients of all their weights are made at once, then added "
    "[Transformer Engine module/grouped_linear.py]",
    "experts' SwiGLU": "keeps its input and the weights of the choices, no temporaries [Megatron "
    "core/fusions/fused_bias_swiglu.py, weighted_bias_swiglu_impl]",
}


@kernel("experts(Tensor x, Tensor weight) -> Tensor")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@kernel("experts_backward(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor)")
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


@kernel("weighted_swiglu(Tensor x, Tensor weights) -> Tensor")
def _(x: Tensor, weights: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@kernel("weighted_swiglu_backward(Tensor grad, Tensor x, Tensor weights) -> (Tensor, Tensor)")
def _(grad: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weights)


def _flops(x: Any, weight: Any, out_val: Any = None, **_: Any) -> int:
    return 2 * x.shape[0] * prod(weight.shape[1:])


def _backward_flops(grad: Any, x: Any, weight: Any, out_val: Any = None, **_: Any) -> int:
    return 4 * x.shape[0] * prod(weight.shape[1:])


flop_registry[OPS.experts] = _flops
flop_registry[OPS.experts_backward] = _backward_flops


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return OPS.experts(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return OPS.experts_backward(grad, *ctx.saved_tensors)


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights)
        return OPS.weighted_swiglu(x, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return OPS.weighted_swiglu_backward(grad, *ctx.saved_tensors)


class GroupedExperts(torch.nn.Module):
    """The experts of a rank: n of them, f/etp columns each."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *_: Any,
        pg_collection: ProcessGroupCollection,
        **__: Any,
    ) -> None:
        super().__init__()
        tensor = pg_collection.expt_tp.size()
        width, hidden = (config.moe_ffn_hidden_size or config.ffn_hidden_size) // tensor, config.hidden_size
        shared_out = pg_collection.ep.size() > 1 or tensor != config.tensor_model_parallel_size
        self.gate_up, self.down = (
            torch.nn.Parameter(torch.empty(num_local_experts, *shape, dtype=config.params_dtype, device="meta"))
            for shape in ((2 * width, hidden), (hidden, width))
        )
        for weight in self.parameters():
            weight.allreduce = not shared_out  # type: ignore[attr-defined]  # Megatron's mark: an optimizer of its own

    def forward(self, tokens: Tensor, _: Any, weights: Tensor) -> tuple[Tensor, None]:
        """Map sorted tokens [t, h], with the router's weights [t], -> [t, h]."""
        return _Product.apply(_WeightedSwiGLU.apply(_Product.apply(tokens, self.gate_up), weights), self.down), None
