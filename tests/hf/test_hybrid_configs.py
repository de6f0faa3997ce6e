"""config.json of hybrids as the hub has them and as transformers 5 writes them; what is refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from megatron.training.arguments import add_megatron_arguments

from bft_megatron.errors import UserError
from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.megatron_flags import megatron_flags
from bft_megatron.hf.weights import parameter_count
from tests.helpers.tiny_models import SavedModel


def _write(folder: Path, raw: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


QWEN35_9B: dict[str, Any] = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "image_token_id": 248056,
    "model_type": "qwen3_5",
    "text_config": {
        "attention_bias": False,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 12288,
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * 8,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "num_attention_heads": 16,
        "num_hidden_layers": 32,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "vocab_size": 248320,
    },
    "tie_word_embeddings": False,
    "vision_config": {"depth": 27, "hidden_size": 1152, "model_type": "qwen3_5"},
}
"""Qwen3.5-9B."""


def _text(raw: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return raw | {"text_config": raw["text_config"] | changes}


QWEN35_27B = _text(
    QWEN35_9B,
    hidden_size=5120,
    intermediate_size=17408,
    layer_types=[*["linear_attention"] * 3, "full_attention"] * 16,
    linear_num_value_heads=48,
    num_attention_heads=24,
    num_hidden_layers=64,
)
EXPERTS = {"moe_intermediate_size": 512, "num_experts_per_tok": 8, "shared_expert_intermediate_size": 512}
QWEN35_35B_A3B = _text(
    QWEN35_9B | {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe"},
    hidden_size=2048,
    intermediate_size=None,
    layer_types=[*["linear_attention"] * 3, "full_attention"] * 10,
    num_experts=256,
    num_hidden_layers=40,
    num_key_value_heads=2,
    **EXPERTS,
)
QWEN3_NEXT_80B_A3B = {
    **QWEN35_35B_A3B["text_config"],
    **{"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "intermediate_size": 5120},
    **{"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "num_experts": 512},
    **{"num_experts_per_tok": 10, "num_hidden_layers": 48, "vocab_size": 151936, "layer_types": None},
    **{"partial_rotary_factor": 0.25, "rope_parameters": None, "rope_theta": 10000000, "mtp_num_hidden_layers": None},
    **{"attn_output_gate": None, "tie_word_embeddings": False},
}
QWEN35_TEXT = QWEN35_9B["text_config"] | {"architectures": ["Qwen3_5ForCausalLM"], "tie_word_embeddings": True}
QWEN35_MOE_TEXT = QWEN35_35B_A3B["text_config"] | {"architectures": ["Qwen3_5MoeForCausalLM"]}


@pytest.mark.parametrize(
    ("raw", "billions", "expected"),
    [
        (QWEN35_9B, 8.95, {"prefix": "model.language_model.", "has_vision": True, "tied": False, "dtype": "bfloat16"}),
        (QWEN35_27B, 26.90, {"rope_theta": 1e7, "rope_factor": None, "rotary_part": 0.25, "prediction_layers": 1}),
        (QWEN35_35B_A3B, 34.66, {"ffn": 512, "kv_heads": 2, "output_gate": True, "zero_centred_norms": True}),
        (QWEN3_NEXT_80B_A3B, 79.67, {"rope_theta": 1e7, "rotary_part": 0.25, "prediction_layers": 0}),
        (QWEN35_TEXT, 7.94, {"prefix": "model.", "has_vision": False, "tied": True, "prediction_layers": 1}),
        (QWEN35_MOE_TEXT, 34.66, {"prefix": "model.", "has_vision": False, "head_dim": 256}),
    ],
)
def test_files_of_the_hub(raw: dict[str, Any], billions: float, expected: dict[str, Any], tmp_path: Path) -> None:
    config = read_config(_write(tmp_path, raw))
    assert round(parameter_count(config) / 1e9, 2) == billions
    assert {name: getattr(config, name) for name in expected} == expected
    net = config.linear_attention
    assert net is not None
    assert net.layers == tuple(i for i in range(config.layers) if i % 4 != 3)
    assert (net.key_heads, net.key_dim, net.value_dim, net.taps) == (16, 128, 128, 4)
    args = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args(megatron_flags(config))
    assert args.linear_attention_freq == [1, 1, 1, 0] * (config.layers // 4)
    assert (args.linear_num_key_heads, args.linear_num_value_heads) == (16, net.value_heads)
    assert (args.experimental_attention_variant, args.attention_output_gate) == ("gated_delta_net", True)
    assert (args.rotary_percent, args.rotary_base, args.layernorm_zero_centered_gamma) == (0.25, 10**7, True)
    if config.experts is not None:
        assert (args.num_experts, args.moe_shared_expert_gate) == (config.experts.count, True)
        assert not args.moe_router_pre_softmax
        assert args.moe_layer_freq == 1


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (_text(QWEN35_9B, attn_output_gate=False), "attn_output_gate: not supported: attention without a gate"),
        (_text(QWEN35_9B, layer_types=["full_attention"] * 32), "layer_types: not supported: a model without linear"),
        (_text(QWEN35_9B, layer_types=["linear_attention"]), "layer_types: not supported: another list than one of"),
        (_text(QWEN35_9B, layer_types=["sliding_attention"] * 32), "layer_types: not supported: another list than one"),
        (
            _text(QWEN35_9B, linear_num_value_heads=24),
            "linear_num_value_heads: not supported: 24 value heads of 16",
        ),
        (_text(QWEN35_9B, attention_bias=True), "attention_bias: not supported"),
        (_text(QWEN35_9B, num_experts=8), "num_experts: not supported: experts in a dense architecture"),
        (_text(QWEN35_9B, mtp_num_hidden_layers=-1), "mtp_num_hidden_layers: must be a whole number from 0, not -1"),
        (
            _text(QWEN35_9B, rope_parameters={"partial_rotary_factor": 3}),
            "partial_rotary_factor: must be above 0 and at most 1, not 3",
        ),
        (QWEN35_9B | {"text_config": None}, "text_config: must be the configuration of a part of the model"),
        (QWEN35_9B | {"quantization_config": {"quant_method": "fp8"}}, "quantization_config: not supported: quantised"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(raw: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_config(_write(tmp_path, raw))


def test_values_are_those_of_transformers(hybrids: list[SavedModel]) -> None:
    for model in hybrids:
        ours = read_config(model.folder)
        theirs = transformers.AutoConfig.from_pretrained(model.folder).get_text_config()
        net = ours.linear_attention
        assert net is not None
        assert [ours.has_linear_attention(i) for i in range(4)] == [k != "full_attention" for k in theirs.layer_types]
        assert (net.key_heads, net.value_heads) == (theirs.linear_num_key_heads, theirs.linear_num_value_heads)
        assert (net.key_dim, net.value_dim) == (theirs.linear_key_head_dim, theirs.linear_value_head_dim)
        assert net.taps == theirs.linear_conv_kernel_dim
        assert ours.head_dim == theirs.head_dim
        assert ours.rotary_part == theirs.rope_parameters["partial_rotary_factor"]
        assert ours.tied == (model.name == "hybrid_vl")
