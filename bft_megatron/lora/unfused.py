"""Transformer Engine's layers with norms apart from the linear layers, so that an adapter sees the normalised input."""

from __future__ import annotations

from typing import Any


def unfused_spec(config: Any, vp_stage: int | None = None) -> Any:
    """Return Transformer Engine's spec with separate norms, for `GPTModelConfig.transformer_layer_spec`.

    A norm fused into the linear layer would leave the adapter with an input that is not normalised. Weights have the
    same names in a checkpoint as with the local and the fused spec.
    """
    from megatron.training.models.gpt import default_layer_spec

    spec = default_layer_spec(config, vp_stage)
    for layer in getattr(spec, "layer_specs", [spec]):  # a mixture's spec is a block's
        _unfuse(layer.submodules)
    return spec


def _unfuse(parts: Any) -> None:
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.mlp import MLPSubmodules

    backend, network = TESpecProvider(), parts.mlp.keywords["submodules"]
    names = get_gpt_layer_local_spec(normalization="RMSNorm").submodules.sharded_state_dict_keys_map
    parts.input_layernorm = parts.pre_mlp_layernorm = backend.layer_norm(has_residual=True)
    parts.self_attention.submodules.linear_qkv = backend.column_parallel_linear()
    if isinstance(network, MLPSubmodules):
        network.linear_fc1 = backend.column_parallel_linear()
    else:  # the norm before a router is a module of its own in the fused spec too
        names = {k: v for k, v in names.items() if k != "pre_mlp_layernorm."}
    parts.sharded_state_dict_keys_map = names
