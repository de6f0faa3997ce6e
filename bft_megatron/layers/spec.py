"""Megatron's local layer spec with this package's norm, core attention and gated delta net.

Everything else, including weights and checkpoint names, is the local spec's. Its `sharded_state_dict_keys_map` stores
the norms under Transformer Engine's names, so a checkpoint is the same with either kind of layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.training.models.gpt import GPTModelConfig

from bft_megatron.layers.attention import CoreAttention
from bft_megatron.layers.delta_net import delta_net
from bft_megatron.layers.norm import RMSNorm


def layer_spec(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Return the decoder's spec for `GPTModelConfig.transformer_layer_spec`: a block's, to set the final norm too."""

    def make(experts: bool, linear: bool) -> ModuleSpec:
        return layer(config.transformer, RMSNorm, CoreAttention, experts=experts, linear=linear)

    return TransformerBlockSubmodules(layer_specs=layers(config.transformer, vp_stage, make), layer_norm=RMSNorm)


def layers(
    transformer: TransformerConfig, vp_stage: int | None, make: Callable[[bool, bool], ModuleSpec]
) -> list[ModuleSpec]:
    """Return the specs of the layers of this rank's pipeline chunk, one object for all layers of a kind.

    Args:
        make: returns a layer's spec by whether it has experts, and linear attention.
    """
    made = cache(make)
    first = get_transformer_layer_offset(transformer, vp_stage)
    chunk = range(first, first + get_num_layers_to_build(transformer, vp_stage))
    return [made(_has_experts(transformer, i), _has_linear_attention(transformer, i)) for i in chunk]


def layer(transformer: TransformerConfig, norm: Any, core_attention: Any, *, experts: bool, linear: bool) -> ModuleSpec:
    """Return a layer's spec with this norm and this core attention."""
    spec = get_gpt_layer_local_spec(
        num_experts=transformer.num_moe_experts if experts else None,
        qk_layernorm=transformer.qk_layernorm,
        normalization=transformer.normalization,
    )
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    # Transformer Engine fuses a norm with the linear layer after it; that before a router is a module in both.
    names = {} if experts else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    if linear:
        parts.self_attention = delta_net(ColumnParallelLinear, RowParallelLinear)
        names["input_layernorm."] = "self_attention.in_proj.layer_norm_"
    else:
        attention = parts.self_attention.submodules
        attention.core_attention = core_attention
        if transformer.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = norm
        names["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    parts.sharded_state_dict_keys_map = names
    return spec


def _has_experts(transformer: TransformerConfig, layer: int) -> bool:
    """Return whether a layer, numbered from 0 over the model, has experts."""
    if transformer.num_moe_experts is None:
        return False
    frequency = transformer.moe_layer_freq
    return bool(frequency[layer]) if isinstance(frequency, list) else layer % frequency == 0


def _has_linear_attention(transformer: TransformerConfig, layer: int) -> bool:
    """Return whether a layer, numbered from 0 over the model, has linear attention: by the list that our flags give."""
    return transformer.experimental_attention_variant is not None and bool(transformer.linear_attention_freq[layer])
