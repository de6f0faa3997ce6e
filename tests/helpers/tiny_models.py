"""Small random models of each architecture, as transformers saves them, with every norm and bias random too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers


@dataclass(frozen=True)
class SavedModel:
    """A model folder and what transformers computes with it."""

    name: str
    folder: Path
    logits: torch.Tensor


ARCHITECTURES = ["llama", "llama3", "qwen2", "qwen3", "mistral"]
MIXTURES = ["qwen2_moe", "qwen3_moe", "mixtral", "hunyuan", "glm"]
VOCABULARY = 301
"""Divisible by nothing, so that Megatron pads it on every layout."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config(architecture: str, **changes: Any) -> transformers.PreTrainedConfig:
    """Llama 2, Llama 3.2 (scaled frequencies, tied), Qwen2, Qwen3 (tied, wide heads), Mistral (a short window); of
    mixtures Qwen2 (a gated shared network, a layer without experts), Qwen3 (tied, wide heads), Mixtral, Hunyuan (a
    norm after the rotary embedding of a larger base) and GLM (a dense first layer, groups, a part of a head rotated).
    """
    sizes = SIZES | changes
    if architecture in MIXTURES:
        return _mixture(architecture, sizes)
    match architecture:
        case "llama":
            return transformers.LlamaConfig(**sizes)
        case "llama3":
            return transformers.LlamaConfig(**{"rope_parameters": LLAMA3, "tie_word_embeddings": True} | sizes)
        case "qwen2":
            return transformers.Qwen2Config(**{"rope_theta": 1e6} | sizes)
        case "qwen3":
            return transformers.Qwen3Config(**{"head_dim": 16, "tie_word_embeddings": True} | sizes)
        case "mistral":
            return transformers.MistralConfig(**{"sliding_window": 7} | sizes)
    raise ValueError(architecture)


def _mixture(architecture: str, sizes: dict[str, Any]) -> transformers.PreTrainedConfig:
    match architecture:
        case "qwen2_moe":
            own = {"shared_expert_intermediate_size": 32, "mlp_only_layers": [1]}
            return transformers.Qwen2MoeConfig(**EXPERTS | own | sizes)
        case "qwen3_moe":
            own = {"norm_topk_prob": True, "head_dim": 16, "tie_word_embeddings": True}
            return transformers.Qwen3MoeConfig(**EXPERTS | own | sizes)
        case "mixtral":
            return transformers.MixtralConfig(**{"num_local_experts": 8, "sliding_window": 7} | sizes)
        case "hunyuan":
            rope = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 10000.0}
            own = {"num_experts": 8, "moe_topk": 3, "head_dim": 16, "rope_parameters": rope, "pad_token_id": None}
            return transformers.HunYuanMoEV1Config(**own | sizes)
        case "glm":
            own = {"n_routed_experts": 8, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2}
            own |= {"moe_intermediate_size": 16, "use_qk_norm": True, "attention_bias": True}
            own |= {"routed_scaling_factor": 1.5, "head_dim": 16, "num_nextn_predict_layers": 0}
            return transformers.Glm4MoeConfig(**own | sizes)
    raise ValueError(architecture)


def save(
    architecture: str, folder: Path, *, shard_size: str = "40KB", dtype: torch.dtype = torch.float32, **changes: Any
) -> transformers.PreTrainedModel:
    """Save a model in many shards, and return it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(architecture, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.uniform_(-1, 1)
            else:
                parameter.mul_(4)  # attention that attends: at 0.02 it is nearly uniform
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.2, 0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return model


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [2, 24] and what of them is prompt: one row is padded on the right."""
    ids = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    return ids, mask


@torch.no_grad()
def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    """transformers' own logits [2, 24, v] of the prompts."""
    ids, mask = prompts()
    return model(input_ids=ids, attention_mask=mask).logits
