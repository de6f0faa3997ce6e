"""Megatron's local layer spec with this package's norm and core attention.

Everything else, including weights and checkpoint names, is the local spec's. Its `sharded_state_dict_keys_map` stores
the norms under Transformer Engine's names, so a checkpoint is the same with either kind of layers.
"""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.training.models.gpt import GPTModelConfig

from bft_megatron.layers.attention import CoreAttention
from bft_megatron.layers.norm import RMSNorm


def layer_spec(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Return the decoder's spec for `GPTModelConfig.transformer_layer_spec`: a block's, to set the final norm too."""
    transformer = config.transformer
    layer = get_gpt_layer_local_spec(qk_layernorm=transformer.qk_layernorm, normalization=transformer.normalization)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = CoreAttention
    if transformer.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layers = get_num_layers_to_build(transformer, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)
