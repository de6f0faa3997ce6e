"""Small random models of each architecture, as transformers saves them, with every norm and bias random too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.helpers.exported import rewrite, tensors


@dataclass(frozen=True)
class SavedModel:
    """A model folder and what transformers computes with it."""

    name: str
    folder: Path
    logits: torch.Tensor


ARCHITECTURES = ["llama", "llama3", "qwen2", "qwen3", "mistral"]
MIXTURES = ["qwen2_moe", "qwen3_moe", "mixtral", "hunyuan", "glm"]
HYBRIDS = ["hybrid", "hybrid_moe", "next", "hybrid_vl", "hybrid_moe_vl"]
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


HYBRID: dict[str, Any] = {
    # A sample's first output is its value times (query . key), which the norm after it may blow up with its rounding.
    "rms_norm_eps": 1e-3,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
SHARED = {"shared_expert_intermediate_size": 32}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 48,
    "num_position_embeddings": 16,
    "patch_size": 4,
}


def config(architecture: str, **changes: Any) -> transformers.PreTrainedConfig:
    """Llama 2, Llama 3.2 (scaled frequencies, tied), Qwen2, Qwen3 (tied, wide heads), Mistral (a short window); of
    mixtures Qwen2 (a gated shared network, a layer without experts), Qwen3 (tied, wide heads), Mixtral, Hunyuan (a
    norm after the rotary embedding of a larger base) and GLM (a dense first layer, groups, a part of a head rotated);
    of hybrids Qwen3.5 (dense, of experts, and each with a vision part) and Qwen3-Next (a layer without experts), with
    1, 2 and 3 value heads a key head.
    """
    sizes = SIZES | changes
    if architecture in HYBRIDS:
        return _hybrid(architecture, HYBRID | sizes)
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


def _hybrid(architecture: str, sizes: dict[str, Any]) -> transformers.PreTrainedConfig:
    match architecture:
        case "hybrid":
            return transformers.Qwen3_5TextConfig(**{"linear_num_value_heads": 4} | sizes)
        case "hybrid_moe":
            return transformers.Qwen3_5MoeTextConfig(**{"linear_num_value_heads": 2} | EXPERTS | SHARED | sizes)
        case "next":
            own = {"linear_num_value_heads": 6, "mlp_only_layers": [1]}
            return transformers.Qwen3NextConfig(**own | EXPERTS | SHARED | sizes)
    own = {"linear_num_value_heads": 6, "mtp_num_hidden_layers": 1}
    tied = {"tie_word_embeddings": sizes.get("tie_word_embeddings", architecture == "hybrid_vl")}
    if architecture == "hybrid_vl":
        return transformers.Qwen3_5Config(text_config=own | sizes | tied, vision_config=VISION, **tied)
    return transformers.Qwen3_5MoeConfig(text_config=own | EXPERTS | SHARED | sizes | tied, vision_config=VISION, **tied)


def save(
    architecture: str, folder: Path, *, shard_size: str = "40KB", dtype: torch.dtype = torch.float32, **changes: Any
) -> transformers.PreTrainedModel:
    """Save a model in many shards, and return it."""
    torch.manual_seed(0)
    kind: Any = transformers.AutoModelForImageTextToText if architecture.endswith("_vl") else AUTO
    model: transformers.PreTrainedModel = kind.from_config(config(architecture, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _draw(name, parameter, zero_centred=architecture in HYBRIDS)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.2, 0.2)
    fp32 = {name: p.clone() for name, p in model.state_dict().items() if name.endswith(FP32)}
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    if architecture in HYBRIDS:
        _as_released(folder, fp32, architecture)
    return model


AUTO = transformers.AutoModelForCausalLM
FP32 = ("linear_attn.A_log", "linear_attn.norm.weight")
"""What released files of hybrids have in fp32 beside bf16."""


def _draw(name: str, parameter: torch.Tensor, *, zero_centred: bool) -> None:
    if name.endswith(("A_log", "conv1d.weight")):
        return  # spread already
    if name.endswith("norm.weight") and zero_centred and "linear_attn" not in name:
        parameter.uniform_(-0.5, 0.5)
    elif "norm" in name:
        parameter.uniform_(0.5, 1.5)
    elif name.endswith("bias"):
        parameter.uniform_(-1, 1)
    else:
        parameter.mul_(4)  # attention that attends: at 0.02 it is nearly uniform


def _as_released(folder: Path, fp32: dict[str, torch.Tensor], architecture: str) -> None:
    """Write the files anew as the hub has them: some tensors in fp32, with a vision part those of a layer for
    multi-token prediction besides, and with experts those of a layer joined.
    """
    whole = tensors(folder) | fp32
    if architecture.endswith("_vl"):
        bf16 = torch.bfloat16
        whole |= {"mtp.fc.weight": torch.randn(48, 96, dtype=bf16), "mtp.norm.weight": torch.randn(48, dtype=bf16)}
    rewrite(folder, joined(whole) if architecture == "hybrid_moe_vl" else whole)


def joined(whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Join the tensors of each layer's experts to two, `gate_up_proj` and `down_proj`."""
    found, experts = dict[str, torch.Tensor](), dict[str, dict[tuple[int, str], torch.Tensor]]()
    for name, t in whole.items():
        at, dot, rest = name.partition(".mlp.experts.")
        if dot and not name.startswith("mtp."):
            number, matrix, _ = rest.split(".")
            experts.setdefault(f"{at}.mlp.experts", {})[int(number), matrix] = t
        else:
            found[name] = t
    for at, of_layer in experts.items():
        gate, up, down = (
            torch.stack([of_layer[i, f"{m}_proj"] for i in range(len(of_layer) // 3)]) for m in ("gate", "up", "down")
        )
        found |= {f"{at}.gate_up_proj": torch.cat([gate, up], 1), f"{at}.down_proj": down}
    return found


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
