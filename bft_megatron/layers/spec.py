"""Megatron's local layer spec with this package's norm and core attention.

Everything else, including weights and checkpoint names, is the local spec's. Its `sharded_state_dict_keys_map` stores
the norms under Transformer Engine's names, so a checkpoint is the same with either kind of layers.
"""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.training.models.gpt import GPTModelConfig

from bft_megatron.layers.attention import CoreAttention
from bft_megatron.layers.norm import RMSNorm


def layer_spec(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Return the decoder's spec for `GPTModelConfig.transformer_layer_spec`: a block's, to set the final norm too."""
    transformer = config.transformer
    dense, mixture = _layer(transformer, None), _layer(transformer, transformer.num_moe_experts)
    first = get_transformer_layer_offset(transformer, vp_stage)
    layers = range(first, first + get_num_layers_to_build(transformer, vp_stage))
    specs = [mixture if has_experts(transformer, i) else dense for i in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


def has_experts(transformer: TransformerConfig, layer: int) -> bool:
    """Return whether a layer, numbered from 0 over the model, has experts."""
    if transformer.num_moe_experts is None:
        return False
    frequency = transformer.moe_layer_freq
    return bool(frequency[layer]) if isinstance(frequency, list) else layer % frequency == 0


def _layer(transformer: TransformerConfig, experts: int | None) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(
        num_experts=experts, qk_layernorm=transformer.qk_layernorm, normalization=transformer.normalization
    )
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = CoreAttention
    if transformer.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if experts is not None:
        # Transformer Engine fuses the norm before the attention alone: that before the router is a module in both.
        names = layer.submodules.sharded_state_dict_keys_map
        layer.submodules.sharded_state_dict_keys_map = {k: v for k, v in names.items() if k != "pre_mlp_layernorm."}
    return layer
