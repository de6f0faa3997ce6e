"""Published architectures of the models in recipes/, so that they can be planned without their files."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from bft_megatron.errors import UserError
from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.hub import find_model
from bft_megatron.hf.model_config import ModelConfig


def _sizes(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        **more,
    }


_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
}
_QWEN3 = _QWEN25 | {"architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "max_position_embeddings": 40960}
_QWEN3_MOE = _QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
_HUNYUAN = {
    "architectures": ["HunYuanMoEV1ForCausalLM"],
    "vocab_size": 128167,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    "tie_word_embeddings": True,
    "head_dim": 128,
    "num_experts": 64,
    "moe_topk": 8,
}
_GLM45 = {
    "architectures": ["Glm4MoeForCausalLM"],
    "vocab_size": 151552,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "head_dim": 128,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}
_QWEN35 = {
    "vocab_size": 248320,
    "max_position_embeddings": 262144,
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25},
    "tie_word_embeddings": False,
}


def _qwen35(**sizes: Any) -> dict[str, Any]:
    return {"architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": _QWEN35 | sizes}


def _qwen35_moe(layers: int, hidden: int, heads: int, expert: int, value_heads: int) -> dict[str, Any]:
    mixture = {"num_experts": 256, "num_experts_per_tok": 8, "linear_num_value_heads": value_heads}
    widths = {"moe_intermediate_size": expert, "shared_expert_intermediate_size": expert}
    sizes = _QWEN35 | _sizes(layers, hidden, heads, 2, expert) | mixture | widths
    return {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "text_config": sizes}


CONFIGS = {
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA | _sizes(32, 4096, 32, 8, 14336),
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA | _sizes(80, 8192, 64, 8, 28672),
    "meta-llama/Llama-3.1-405B-Instruct": _LLAMA | _sizes(126, 16384, 128, 8, 53248),
    "Qwen/Qwen2.5-7B-Instruct": _QWEN25 | _sizes(28, 3584, 28, 4, 18944),
    "Qwen/Qwen2.5-32B-Instruct": _QWEN25 | _sizes(64, 5120, 40, 8, 27648),
    "Qwen/Qwen3-8B": _QWEN3 | _sizes(36, 4096, 32, 8, 12288, head_dim=128),
    "Qwen/Qwen3-30B-A3B": _QWEN3_MOE | _sizes(48, 2048, 32, 4, 6144, moe_intermediate_size=768),
    "Qwen/Qwen3-235B-A22B": _QWEN3_MOE | _sizes(94, 4096, 64, 4, 12288, moe_intermediate_size=1536),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": _MIXTRAL | _sizes(32, 4096, 32, 8, 14336),
    "tencent/Hunyuan-A13B-Instruct": _HUNYUAN | _sizes(32, 4096, 32, 8, 3072),
    "Qwen/Qwen3.5-9B": _qwen35(**_sizes(32, 4096, 16, 4, 12288, linear_num_value_heads=32)),
    "Qwen/Qwen3.5-27B": _qwen35(**_sizes(64, 5120, 24, 4, 17408, linear_num_value_heads=48)),
    "Qwen/Qwen3.5-35B-A3B": _qwen35_moe(40, 2048, 16, expert=512, value_heads=32),
    "Qwen/Qwen3.5-122B-A10B": _qwen35_moe(48, 3072, 32, expert=1024, value_heads=64),
    "zai-org/GLM-4.5-Air": _GLM45 | _sizes(46, 4096, 96, 8, 10944, moe_intermediate_size=1408),
}
"""Hub id -> the fields of its `config.json` that determine sizes."""


def model_config(name: str) -> ModelConfig:
    """Return a model's configuration, from its own file or from `CONFIGS` by its hub id.

    Raises:
        UserError: there is neither, or the architecture is not supported.
    """
    try:
        return read_config(find_model(name))
    except UserError:
        if name not in CONFIGS or Path(name).exists():
            raise
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIGS[name]))
        return read_config(Path(folder))
