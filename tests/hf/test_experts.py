"""config.json of mixtures of experts as the hub has them and as transformers 5 writes them; what is refused."""

from __future__ import annotations

import argparse
import json
import re
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

QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN2_57B_A14B = QWEN3_30B_A3B | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "head_dim": None,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "moe_intermediate_size": 2560,
    "norm_topk_prob": False,
    "num_attention_heads": 28,
    "num_experts": 64,
    "num_hidden_layers": 28,
    "shared_expert_intermediate_size": 20480,
}
MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
HUNYUAN_A13B: dict[str, Any] = {
    "architectures": ["HunYuanMoEV1ForCausalLM"],
    "attention_bias": False,
    "attention_head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 3072,
    "max_position_embeddings": 32768,
    "mlp_bias": False,
    "moe_intermediate_size": [3072] * 32,
    "moe_topk": [8] * 32,
    "n_group": False,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 64,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_shared_expert": [1] * 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "type": "dynamic"},
    "rope_theta": 10000.0,
    "routed_scaling_factor": False,
    "tie_word_embeddings": True,
    "use_cla": False,
    "use_mixed_mlp_moe": True,
    "use_qk_norm": True,
    "vocab_size": 128167,
}
GLM_45_AIR: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_qk_norm": False,
    "vocab_size": 151552,
}


def _write(folder: Path, raw: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize(
    ("raw", "billions"),
    [
        (QWEN3_30B_A3B, 30.53),
        (QWEN2_57B_A14B, 57.41),
        (MIXTRAL_8X7B, 46.70),
        (HUNYUAN_A13B, 80.39),
        (GLM_45_AIR, 106.85),
    ],
)
def test_files_of_the_hub_give_the_models_sizes(raw: dict[str, Any], billions: float, tmp_path: Path) -> None:
    assert round(parameter_count(read_config(_write(tmp_path, raw))) / 1e9, 2) == billions


def test_values_of_the_hub_that_other_keys_of_transformers_hold(tmp_path: Path) -> None:
    hunyuan = read_config(_write(tmp_path, HUNYUAN_A13B))
    assert hunyuan.head_dim == 128
    assert hunyuan.rope_theta == 10000.0 * 1000.0 ** (128 / 126)
    assert hunyuan.rope_factor is None
    assert hunyuan.experts is not None
    assert (hunyuan.experts.per_token, hunyuan.experts.shared_ffn) == (8, 3072)
    assert read_config(_write(tmp_path, MIXTRAL_8X7B)).rope_theta == 1e6  # transformers' default for it
    glm = read_config(_write(tmp_path, GLM_45_AIR))
    assert (glm.qkv_bias, glm.qk_norm, glm.rotary_part, glm.prediction_layers) == (True, False, 0.5, 1)


def test_values_are_those_of_transformers(mixtures: list[SavedModel]) -> None:
    for model in mixtures:
        ours, theirs = read_config(model.folder), transformers.AutoConfig.from_pretrained(model.folder)
        experts = ours.experts
        assert experts is not None
        assert experts.count == theirs.num_local_experts if hasattr(theirs, "num_local_experts") else theirs.num_experts
        assert experts.per_token == theirs.num_experts_per_tok
        assert experts.ffn == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
        assert ours.rotary_part == theirs.rope_parameters.get("partial_rotary_factor", 1.0)
        assert ours.window == (getattr(theirs, "sliding_window", None) or None)
        assert ours.qkv_bias == (getattr(theirs, "qkv_bias", False) or theirs.to_dict().get("attention_bias", False))


@pytest.mark.parametrize(
    ("raw", "old", "new"),
    [
        (QWEN3_30B_A3B, "num_experts", "num_local_experts"),
        (MIXTRAL_8X7B, "num_local_experts", "num_experts"),
        (GLM_45_AIR, "n_routed_experts", "num_local_experts"),
        (HUNYUAN_A13B, "moe_topk", "num_experts_per_tok"),
    ],
)
def test_a_number_under_another_name(raw: dict[str, Any], old: str, new: str, tmp_path: Path) -> None:
    renamed = {(new if key == old else key): value for key, value in raw.items()}
    assert read_config(_write(tmp_path, renamed)) == read_config(_write(tmp_path, raw))
    with pytest.raises(UserError, match=f"{old}: is not {new}, which is another name of it"):
        read_config(_write(tmp_path, raw | {new: 3}))
    with pytest.raises(UserError, match=rf"config\.json: {old}: must be a positive whole number, not None"):
        read_config(_write(tmp_path, {key: value for key, value in raw.items() if key != old}))


def test_megatron_parses_the_flags(mixtures: list[SavedModel]) -> None:
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    parsed = {m.name: parser.parse_args(megatron_flags(read_config(m.folder))) for m in mixtures}
    for args in parsed.values():
        assert (args.num_experts, args.moe_router_dtype) == (8, "fp32")
    assert [args.moe_router_pre_softmax for args in parsed.values()] == [True, False, False, False, False]
    assert parsed["qwen2_moe"].moe_layer_freq == [1, 0, 1, 1]
    assert parsed["mixtral"].moe_layer_freq == 1  # a list would store each layer apart
    assert not parsed["hunyuan"].qk_layernorm  # Megatron's own is before the rotary embedding
    glm = parsed["glm"]
    assert (glm.moe_router_score_function, glm.moe_router_topk_scaling_factor) == ("sigmoid", 1.5)
    assert (glm.moe_router_num_groups, glm.moe_router_group_topk) == (4, 2)
    assert (glm.moe_router_enable_expert_bias, glm.moe_router_bias_update_rate) == (True, 0.0)
    assert (glm.rotary_percent, glm.add_qkv_bias, glm.qk_layernorm) == (0.5, True, True)


@pytest.mark.parametrize(
    ("raw", "changes", "message"),
    [
        (QWEN2_57B_A14B, {"qkv_bias": False}, "qkv_bias: not supported: query, key and value without a bias"),
        (QWEN3_30B_A3B, {"num_experts_per_tok": 129}, "num_experts_per_tok: not supported: 129 experts a token of 128"),
        (QWEN3_30B_A3B, {"num_experts_per_tok": 1}, "norm_topk_prob: not supported: one expert a token"),
        (HUNYUAN_A13B, {"moe_topk": [8] * 31 + [4]}, "moe_topk: not supported: layers that differ in it"),
        (HUNYUAN_A13B, {"moe_topk": [8] * 31}, "moe_topk: not supported: layers that differ in it"),
        (HUNYUAN_A13B, {"moe_topk": [0] * 32}, "moe_topk: must be a positive whole number, not 0"),
        (HUNYUAN_A13B, {"num_experts": [64, 32] * 16}, "num_experts: not supported: layers that differ"),
        (
            HUNYUAN_A13B,
            {"moe_intermediate_size": 1536},
            "moe_intermediate_size: not supported: another value",
        ),
        (HUNYUAN_A13B, {"num_shared_expert": [2] * 32}, "num_shared_expert: not supported: another value than 1"),
        (HUNYUAN_A13B, {"use_mixed_mlp_moe": False}, "use_mixed_mlp_moe: not supported"),
        (HUNYUAN_A13B, {"use_qk_norm": False}, "use_qk_norm: not supported"),
        (HUNYUAN_A13B, {"norm_topk_prob": False}, "norm_topk_prob: not supported"),
        (HUNYUAN_A13B, {"use_cla": True}, "use_cla: not supported"),
        (HUNYUAN_A13B, {"moe_layer_num_skipped": 1}, "moe_layer_num_skipped: not supported"),
        (
            HUNYUAN_A13B,
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope scaling of type 'dynamic'",
        ),
        (GLM_45_AIR, {"norm_topk_prob": False}, "norm_topk_prob: not supported: sigmoid scores that are not divided"),
        (GLM_45_AIR, {"num_experts_per_tok": 1}, "num_experts_per_tok: not supported: sigmoid scores of one expert"),
        (GLM_45_AIR, {"n_group": 8, "topk_group": 2}, "n_group: not supported: 8 experts a token from 2 groups"),
        (GLM_45_AIR, {"n_group": 7, "topk_group": 4}, "n_group: not supported: 7 groups of 128 experts"),
        (GLM_45_AIR, {"first_k_dense_replace": -1}, "first_k_dense_replace: must be a whole number from 0, not -1"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    raw: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        read_config(_write(tmp_path, raw | changes))


def test_groups_of_which_all_are_chosen_are_none(tmp_path: Path) -> None:
    config = read_config(_write(tmp_path, GLM_45_AIR | {"n_group": 4, "topk_group": 4}))
    assert config.experts is not None
    assert (config.experts.groups, config.experts.groups_per_token) == (1, 1)


@pytest.mark.parametrize("name", ["DeepseekV3ForCausalLM", "GptOssForCausalLM"])
def test_mixtures_that_are_not_supported(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{name}: supported are Llama.*Glm4MoeForCausalLM"):
        read_config(_write(tmp_path, QWEN3_30B_A3B | {"architectures": [name]}))
