"""config.json as transformers 4 and 5 write it, the flags that Megatron's parser gets from it, and what is refused."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from megatron.training.arguments import add_megatron_arguments

from bft_megatron.errors import UserError
from bft_megatron.hf.architectures import companions, read_config
from bft_megatron.hf.megatron_flags import megatron_flags
from bft_megatron.hf.model_config import ModelConfig
from tests.helpers import tiny_models
from tests.helpers.tiny_models import SavedModel


def _write(folder: Path, raw: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def test_values_are_those_of_transformers(models: list[SavedModel]) -> None:
    for model in models:
        ours, theirs = read_config(model.folder), transformers.AutoConfig.from_pretrained(model.folder)
        assert ours.layers == theirs.num_hidden_layers
        assert ours.hidden == theirs.hidden_size
        assert ours.ffn == theirs.intermediate_size
        assert (ours.heads, ours.kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
        assert ours.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
        assert ours.vocab_size == theirs.vocab_size
        assert ours.tied == theirs.tie_word_embeddings
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.rope_factor == theirs.rope_parameters.get("factor")
        assert ours.norm_eps == theirs.rms_norm_eps
        assert ours.window == getattr(theirs, "sliding_window", None)
        assert ours.max_positions == theirs.max_position_embeddings
        assert ours.initializer_range == theirs.initializer_range
        assert ours.dtype == "float32"


LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
LLAMA_32 = LLAMA_2 | {
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "rope_scaling": {k: v for k, v in tiny_models.LLAMA3.items() if k != "rope_theta"},
    "tie_word_embeddings": True,
}
MISTRAL = LLAMA_2 | {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 8}
QWEN = LLAMA_2 | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096, "max_window_layers": 28}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (LLAMA_2, {"kv_heads": 32, "head_dim": 128, "rope_theta": 10000.0, "rope_factor": None, "dtype": "float16"}),
        (LLAMA_32, {"kv_heads": 8, "rope_theta": 500000.0, "rope_factor": 32.0, "tied": True, "window": None}),
        (MISTRAL, {"window": 4096, "qkv_bias": False}),
        (MISTRAL | {"sliding_window": None}, {"window": None}),
        (MISTRAL | {"sliding_window": 1024}, {"window": 1024}),
        (QWEN, {"window": None, "qkv_bias": True, "qk_norm": False}),
        (QWEN | {"use_sliding_window": True, "max_window_layers": 32}, {"window": None}),
        (QWEN | {"use_sliding_window": True, "max_window_layers": 0}, {"window": 4096}),
        (QWEN | {"layer_types": ["full_attention"] * 32}, {"window": None}),
        (QWEN | {"architectures": ["Qwen3ForCausalLM"]}, {"head_dim": 128, "qk_norm": True, "qkv_bias": False}),
        (QWEN | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 64}, {"head_dim": 64}),
    ],
)
def test_configurations_of_transformers_4(raw: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    config = read_config(_write(tmp_path, raw))
    assert {name: getattr(config, name) for name in expected} == expected


def _parse(config: ModelConfig) -> argparse.Namespace:
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return parser.parse_args(megatron_flags(config))


def test_megatron_parses_the_flags(models: list[SavedModel]) -> None:
    for model in models:
        config = read_config(model.folder)
        args = _parse(config)
        assert args.num_layers == config.layers
        assert (args.hidden_size, args.ffn_hidden_size) == (config.hidden, config.ffn)
        assert args.group_query_attention
        assert (args.num_attention_heads, args.num_query_groups) == (config.heads, config.kv_heads)
        assert args.kv_channels == config.head_dim
        assert (args.normalization, args.layernorm_epsilon) == ("RMSNorm", config.norm_eps)
        assert args.swiglu
        assert not args.add_bias_linear
        assert args.add_qkv_bias == config.qkv_bias
        assert args.qk_layernorm == config.qk_norm
        assert (args.position_embedding_type, args.rotary_base, args.rotary_percent) == ("rope", config.rope_theta, 1.0)
        assert args.use_rope_scaling == (config.rope_factor is not None)
        assert args.window_size == (None if config.window is None else (config.window - 1, 0))
        assert args.untie_embeddings_and_output_weights != config.tied
        assert (args.max_position_embeddings, args.vocab_size) == (config.max_positions, config.vocab_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "GPT2LMHeadModel: supported are LlamaForCausalLM, Qwen2ForCausalLM, .*Bridge",
        ),
        ({"architectures": None}, "no architecture: supported are"),
        ({"hidden_act": "gelu"}, "config.json: hidden_act: not supported: the activation 'gelu'"),
        ({"attention_bias": True}, "attention_bias: not supported: a bias"),
        ({"mlp_bias": True}, "mlp_bias: not supported: a bias"),
        ({"num_local_experts": 8}, "num_local_experts: not supported: experts in a dense architecture"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: not supported: quantised weights"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling of type 'linear' .llama3 is."),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling of type 'yarn'"),
        (
            {"rope_scaling": tiny_models.LLAMA3 | {"low_freq_factor": 2.0}},
            "llama3 rope scaling with low_freq_factor 2.0",
        ),
        ({"rope_scaling": tiny_models.LLAMA3 | {"factor": None}}, "llama3 rope scaling without a factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rotary embeddings that differ by layer"),
        ({"hidden_size": None}, "config.json: hidden_size: must be a positive whole number, not None"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers: must be a positive whole number, not '32'"),
        ({"vocab_size": 0}, "vocab_size: must be a positive whole number, not 0"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "max_window_layers": 16},
            "max_window_layers: not supported: layers of full and of sliding attention",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_config(_write(tmp_path, LLAMA_2 | changes))


def test_folders_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such model folder"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_config(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json(:1)?: (not|must be) "):
            read_config(tmp_path)


def test_companions_are_all_but_the_weights(tmp_path: Path) -> None:
    kept = {"config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt"}
    for name in kept | {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "modeling.py"}:
        (tmp_path / name).touch()
    assert {f.name for f in companions(tmp_path)} == kept


def test_reading_a_configuration_does_not_import_torch(models: list[SavedModel]) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from bft_megatron.hf.architectures import read_config\n"
        "from bft_megatron.hf.megatron_flags import megatron_flags\n"
        "megatron_flags(read_config(Path(sys.argv[1]))); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, models[0].folder], check=True, timeout=60)


def test_configuration_is_frozen(models: list[SavedModel]) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        read_config(models[0].folder).layers = 3
