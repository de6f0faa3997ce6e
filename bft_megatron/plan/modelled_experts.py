"""A mixture's experts as one grouped product, for planning a GPU step: memory and work of Transformer Engine's layers.

The matrices of a rank's experts are one parameter, so that a layer of many experts is traced as fast as of one; their
adapters are one each, as in a run.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from bft_megatron.hf.load import place_of
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.lora.adapters import attach
from bft_megatron.lora.factors import adapted
from bft_megatron.lora.layers import adapter_of
from bft_megatron.plan.kernels import OPS, kernel
from bft_megatron.recipe.schema import LoraSettings

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
        ctx.save_for_backward(*([x] if weight.requires_grad else []), weight)
        return OPS.experts(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        *x, weight = ctx.saved_tensors
        if x:
            return OPS.experts_backward(grad, *x, weight)
        return OPS.experts(grad, weight.transpose(1, 2)), None


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights)
        return OPS.weighted_swiglu(x, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return OPS.weighted_swiglu_backward(grad, *ctx.saved_tensors)


class GroupedLinear(torch.nn.Module):
    """A matrix of each of n experts, [n, out, in] in all."""

    def __init__(self, n: int, out: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrices = torch.nn.Parameter(torch.empty(n, out, columns, dtype=dtype, device="meta"))

    def forward(self, x: Tensor, _: list[int]) -> tuple[Tensor, None]:
        """Map sorted tokens [t, in] -> [t, out]; an adapter's hook reads how many are each expert's."""
        return _Product.apply(x, self.matrices), None


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
        self.linear_fc1 = GroupedLinear(num_local_experts, 2 * width, hidden, config.params_dtype)
        self.linear_fc2 = GroupedLinear(num_local_experts, hidden, width, config.params_dtype)
        for weight in self.parameters():
            weight.allreduce = not shared_out  # type: ignore[attr-defined]  # Megatron's mark: an optimizer of its own

    def forward(self, x: Tensor, counts: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        """Map sorted tokens [t, h], their numbers by expert [n] and the router's weights [t] -> [t, h]."""
        tokens = counts.tolist()
        hidden, _ = self.linear_fc1(x, tokens)
        return self.linear_fc2(_WeightedSwiGLU.apply(hidden, weights), tokens)


def adapt(config: ModelConfig, settings: LoraSettings) -> Callable[[list[GPTModel]], list[GPTModel]]:
    """Return a hook for `GPTModelConfig.pre_wrap_hooks`, after `lora_hook`, that gives the experts their adapters."""
    table = {entry.weight.path: entry for entry in adapted(config, settings)}

    def hook(chunks: list[GPTModel]) -> list[GPTModel]:
        for chunk in chunks:
            place = place_of(chunk, config)
            for name, layer in list(chunk.named_modules()):
                if isinstance(layer, GroupedLinear):
                    paths = [place.path(f"{name}.weight{i}") for i in range(len(layer.matrices))]
                    entries = [table[path] for path in paths if path in table]
                    if entries:
                        attach(layer, [adapter_of(e, settings, False, layer.matrices) for e in entries])
        return chunks

    return hook
