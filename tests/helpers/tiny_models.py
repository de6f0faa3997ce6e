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
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config(architecture: str, **changes: Any) -> transformers.PreTrainedConfig:
    """Llama 2, Llama 3.2 (scaled frequencies, tied), Qwen2, Qwen3 (tied, wide heads), Mistral (a short window)."""
    sizes = SIZES | changes
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
