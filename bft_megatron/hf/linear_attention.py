"""Reading the gated delta nets of a hybrid model from its `config.json`."""

from __future__ import annotations

from bft_megatron.hf.config_file import ConfigFile
from bft_megatron.hf.model_config import LinearAttention

LINEAR, FULL = "linear_attention", "full_attention"


def qwen3_5(raw: ConfigFile) -> LinearAttention:
    """Return the gated delta nets of Qwen3.5, whose files have a tensor for each projection but query, key and value.

    Raises:
        UserError: no layer has one, or value heads are not shared evenly.
    """
    return _read(raw, joined_by_head=False)


def qwen3_next(raw: ConfigFile) -> LinearAttention:
    """Return the gated delta nets of Qwen3-Next, whose files join the projections by key head. Raises as `qwen3_5`."""
    return _read(raw, joined_by_head=True)


def _read(raw: ConfigFile, *, joined_by_head: bool) -> LinearAttention:
    if not raw.get("attn_output_gate", True):
        raise raw.unsupported("attention without a gate of its output", "attn_output_gate")
    net = LinearAttention(
        layers=_layers(raw),
        key_heads=raw.integer("linear_num_key_heads", 16),
        value_heads=raw.integer("linear_num_value_heads", 32),
        key_dim=raw.integer("linear_key_head_dim", 128),
        value_dim=raw.integer("linear_value_head_dim", 128),
        taps=raw.integer("linear_conv_kernel_dim", 4),
        joined_by_head=joined_by_head,
    )
    if net.value_heads % net.key_heads:
        raise raw.unsupported(f"{net.value_heads} value heads of {net.key_heads} key heads", "linear_num_value_heads")
    return net


def _layers(raw: ConfigFile) -> tuple[int, ...]:
    """Return the layers that have one: by `layer_types`, or all but each `full_attention_interval`-th."""
    count, interval = raw.integer("num_hidden_layers"), raw.integer("full_attention_interval", 4)
    kinds = raw.get("layer_types", [LINEAR if (i + 1) % interval else FULL for i in range(count)])
    if not isinstance(kinds, list) or len(kinds) != count or not set(kinds) <= {LINEAR, FULL}:
        raise raw.unsupported(f"another list than one of {LINEAR} or {FULL} for each layer", "layer_types")
    if LINEAR not in kinds:
        raise raw.unsupported("a model without linear attention", "layer_types")
    return tuple(i for i, kind in enumerate(kinds) if kind == LINEAR)
