"""Megatron's gated delta net with the parameters of released models, in layers of torch and of Transformer Engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec
from torch import Tensor

from bft_megatron.layers import delta_rule
from bft_megatron.upstream import gated_delta

Spec = Callable[..., TransformerBlockSubmodules]
"""A function for `GPTModelConfig.transformer_layer_spec`: of the model's configuration and `vp_stage`."""


class _KeepingFp32(torch.nn.Module):
    """A module of whose own parameters some stay fp32 when the model becomes bf16 or fp16."""

    in_fp32: tuple[str, ...]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: self.get_parameter(name).data for name in self.in_fp32}
        super()._apply(fn, recurse)
        for name, value in before.items():
            parameter = self.get_parameter(name)
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = value.to(parameter.device, torch.float32)
        return self


class DeltaNet(_KeepingFp32, GatedDeltaNet):
    """Megatron's `GatedDeltaNet` whose decay's logarithm `A_log` is fp32, as in the files of released models."""

    in_fp32 = ("A_log",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.A_log.data = self.A_log.data.float()


class HeadNorm(_KeepingFp32, torch.nn.RMSNorm):
    """The norm of each head of a gated delta net's output: fp32, and not zero-centred where other norms are.

    A tensor-parallel rank norms its own heads, with sequence parallelism and without, so the weight's gradient is
    summed over TP in the backward pass. Megatron sums it only under sequence parallelism.
    """

    in_fp32 = ("weight",)

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=torch.float32)
        # Looked up once: in the forward pass that would end a compiled graph.
        self.group = parallel_state.get_tensor_model_parallel_group(check_initialized=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., dv] in fp32 -> [..., dv]. Backward: an all-reduce over TP of the weight's gradient."""
        weight = tensor_parallel.copy_to_tensor_model_parallel_region(self.weight, self.group)
        return torch.nn.functional.rms_norm(x.float(), self.normalized_shape, weight, self.eps)


def delta_net(in_proj: Any, out_proj: Any) -> ModuleSpec:
    """Return the spec of a gated delta net with these linear layers, for `self_attention` of a layer."""
    gated_delta.use_where_missing(delta_rule.l2norm, delta_rule.causal_conv1d, delta_rule.chunk_gated_delta_rule)
    submodules = GatedDeltaNetSubmodules(in_proj=in_proj, out_norm=HeadNorm, out_proj=out_proj)
    return ModuleSpec(module=DeltaNet, submodules=submodules)


def with_delta_nets(spec: Spec | None) -> Spec:
    """Return a layer spec, of a block, whose gated delta nets are ours; None: of Megatron's default spec."""

    def made(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        block = (spec or default_layer_spec)(config, vp_stage)
        for layer in block.layer_specs:
            attention = layer.submodules.self_attention
            if attention.module is GatedDeltaNet:
                own = delta_net(attention.submodules.in_proj, attention.submodules.out_proj)
                layer.submodules.self_attention = own
        return block

    return made
