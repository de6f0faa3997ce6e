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
    for layer in getattr(spec, "layer_specs", [spec]):  # a mixture's spec and a hybrid's are a block's
        _unfuse(layer.submodules)
    return spec


def _unfuse(parts: Any) -> None:
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet
    from megatron.core.transformer.mlp import MLPSubmodules

    backend, attention, network = TESpecProvider(), parts.self_attention, parts.mlp.keywords["submodules"]
    parts.input_layernorm = parts.pre_mlp_layernorm = backend.layer_norm(has_residual=True)
    first = "in_proj" if issubclass(attention.module, GatedDeltaNet) else "linear_qkv"
    setattr(attention.submodules, first, backend.column_parallel_linear())
    names = {"input_layernorm.": f"self_attention.{first}.layer_norm_"}
    if isinstance(network, MLPSubmodules):  # the norm before a router is a module of its own in the fused spec too
        network.linear_fc1 = backend.column_parallel_linear()
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    parts.sharded_state_dict_keys_map = names
