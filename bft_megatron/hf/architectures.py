"""The supported architectures: reading a Hugging Face `config.json`.

`megatron_flags` turns the result into Megatron's flags, and `weights` maps the tensors to Megatron's parameters. No
torch here: a folder is read and refused before anything slow starts. To add an architecture, add it to `ARCHITECTURES`
and its own tensors to `weights`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bft_megatron.errors import UserError, reading, shortened
from bft_megatron.hf import experts, hub, linear_attention
from bft_megatron.hf.config_file import ConfigFile
from bft_megatron.hf.model_config import VISION, Experts, LinearAttention, ModelConfig

TEXT_PART = "text_config"
"""The key of config.json with the configuration of the decoder of a model of several parts."""


@dataclass(frozen=True)
class Architecture:
    """Properties of a transformers class that `config.json` has no field for, or may leave out."""

    window: Callable[[ConfigFile], int | None] = lambda _: None
    qkv_bias: bool | None = False
    """Whether query, key and value have a bias; None: where the config's `attention_bias` says so."""
    qk_norm: bool | None = False
    """Whether query and key are normalised; None: where the config's `use_qk_norm` says so."""
    norm_after_rotary: bool = False
    rotary_part: float | None = None
    """Default part of each head that has the rotary embedding; None: always the whole head."""
    rope_alpha: bool = False
    """Whether `dynamic` rope scaling with an `alpha` is a larger base of the rotary embedding."""
    rope_theta: float = 10000.0
    """Default base of the rotary embedding."""
    prediction_key: str = ""
    """The config's key with the number of layers for multi-token prediction; empty: it has none."""
    prediction_layers: int = 0
    """Default number of these layers."""
    head_dim: int | None = None
    """Default if the config has no head_dim; None: hidden size / heads."""
    experts: Callable[[ConfigFile], Experts] | None = None
    """Reads the experts of a mixture; None: a dense model."""
    linear_attention: Callable[[ConfigFile], LinearAttention] | None = None
    """Reads the gated delta nets of a hybrid, whose norms are zero-centred and whose attention has a gate."""
    text_part: bool = False
    """Whether the decoder is a part of a model of several, described by the config's TEXT_PART."""
    carried: tuple[str, ...] = ()
    """Beginnings of the names of tensors in the files that are not trained."""


def _mistral_window(raw: ConfigFile) -> int | None:
    null = raw.values.get("sliding_window", 4096) is None  # no window, as since v0.2
    return None if null else raw.integer("sliding_window", 4096)


def _mixtral_window(raw: ConfigFile) -> int | None:
    return raw.integer("sliding_window") if raw.get("sliding_window", None) else None


def _qwen_window(raw: ConfigFile) -> int | None:
    """Return Qwen's window. Qwen's first `max_window_layers` layers have full attention; a mix of both is refused."""
    layers, window = raw.integer("num_hidden_layers"), raw.values.get("sliding_window", 4096)
    if not raw.get("use_sliding_window", False) or window is None:
        return None
    first = raw.get("max_window_layers", 28)
    kinds = set(
        raw.get("layer_types", ["full_attention"] * min(first, layers) + ["sliding_attention"] * max(layers - first, 0))
    )
    if len(kinds) > 1:
        raise raw.unsupported("layers of full and of sliding attention in one model", "max_window_layers")
    return raw.integer("sliding_window", 4096) if kinds == {"sliding_attention"} else None


QWEN3_5 = Architecture(
    qk_norm=True,
    head_dim=256,
    rotary_part=0.25,
    linear_attention=linear_attention.qwen3_5,
    prediction_key="mtp_num_hidden_layers",
    carried=("mtp.",),
)
QWEN3_5_MOE = replace(QWEN3_5, experts=experts.qwen3_5_moe)
OF_SEVERAL: dict[str, Any] = {"text_part": True, "carried": ("mtp.", VISION)}

ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(),  # Llama 2, 3, 3.1, 3.2, 3.3 and SmolLM2
    "Qwen2ForCausalLM": Architecture(window=_qwen_window, qkv_bias=True),  # and Qwen2.5
    "Qwen3ForCausalLM": Architecture(window=_qwen_window, qk_norm=True, head_dim=128),
    "MistralForCausalLM": Architecture(window=_mistral_window),
    "Qwen2MoeForCausalLM": Architecture(window=_qwen_window, qkv_bias=True, experts=experts.qwen2_moe),
    "Qwen3MoeForCausalLM": Architecture(window=_qwen_window, qk_norm=True, experts=experts.qwen3_moe),
    "MixtralForCausalLM": Architecture(window=_mixtral_window, rope_theta=1e6, experts=experts.mixtral),
    "HunYuanMoEV1ForCausalLM": Architecture(
        qk_norm=True, norm_after_rotary=True, rope_alpha=True, experts=experts.hunyuan
    ),
    "Glm4MoeForCausalLM": Architecture(
        qkv_bias=None,
        qk_norm=None,
        rotary_part=0.5,
        prediction_key="num_nextn_predict_layers",
        prediction_layers=1,
        experts=experts.glm4_moe,
    ),
    "Qwen3_5ForCausalLM": QWEN3_5,
    "Qwen3_5ForConditionalGeneration": replace(QWEN3_5, **OF_SEVERAL),
    "Qwen3_5MoeForCausalLM": QWEN3_5_MOE,
    "Qwen3_5MoeForConditionalGeneration": replace(QWEN3_5_MOE, **OF_SEVERAL),
    "Qwen3NextForCausalLM": replace(QWEN3_5, linear_attention=linear_attention.qwen3_next, experts=experts.qwen3_next),
}


def read_config(folder: Path) -> ModelConfig:
    """Read `config.json` of a model folder, as written by transformers 4 or 5.

    Raises:
        UserError: no such folder or file, or an unsupported architecture or feature.
    """
    raw = ConfigFile.of(folder)
    with reading(str(raw.path)):  # values of other types than a model's
        return _config(raw)


def _config(raw: ConfigFile) -> ModelConfig:
    names = raw.get("architectures", [])
    if not isinstance(names, list) or len(names) != 1 or str(names[0]) not in ARCHITECTURES:
        shown = ", ".join(map(str, names)) if isinstance(names, list) else str(names)
        raise UserError(
            f"{shortened(shown) or 'no architecture'}: supported are {', '.join(ARCHITECTURES)}. For other models see "
            "Megatron-Bridge (https://github.com/NVIDIA-NeMo/Megatron-Bridge)",
            f"{raw.path}: architectures",
        )
    architecture = ARCHITECTURES[names[0]]
    if architecture.text_part:
        raw = raw.part(TEXT_PART, ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config"))
    _refuse_unsupported(raw, architecture)
    mixture = experts.checked(raw, architecture.experts(raw)) if architecture.experts else None
    hidden, heads = raw.integer("hidden_size"), raw.integer("num_attention_heads")
    head_dim = _head_dim(raw, architecture)
    rope = _rope(raw, architecture)
    return ModelConfig(
        architecture=names[0],
        layers=raw.integer("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=raw.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        ffn=raw.integer("intermediate_size", mixture.ffn if mixture else None),
        vocab_size=raw.integer("vocab_size"),
        tied=bool(raw.get("tie_word_embeddings", False)),
        rope_theta=_rope_base(raw, rope, architecture, head_dim),
        rope_factor=_rope_factor(raw, rope, architecture),
        norm_eps=raw.number("rms_norm_eps", 1e-6),
        qkv_bias=_given(architecture.qkv_bias, raw, "attention_bias"),
        qk_norm=_given(architecture.qk_norm, raw, "use_qk_norm"),
        window=architecture.window(raw),
        max_positions=raw.integer("max_position_embeddings"),
        initializer_range=raw.number("initializer_range", 0.02),
        dtype=raw.get("dtype", raw.get("torch_dtype", None)),
        norm_after_rotary=architecture.norm_after_rotary,
        rotary_part=_rotary_part(raw, rope, architecture),
        prediction_layers=_prediction_layers(raw, architecture),
        experts=mixture,
        linear_attention=architecture.linear_attention(raw) if architecture.linear_attention else None,
        output_gate=architecture.linear_attention is not None,
        zero_centred_norms=architecture.linear_attention is not None,
        prefix="model.language_model." if architecture.text_part else "model.",
        carried=architecture.carried,
    )


def _prediction_layers(raw: ConfigFile, architecture: Architecture) -> int:
    key = architecture.prediction_key
    return raw.integer(key, architecture.prediction_layers, least=0) if key else 0


def companions(folder: Path) -> list[Path]:
    """Return a model folder's files other than weights: configurations, tokenizer, chat template."""
    kinds = (".json", ".jinja", ".model", ".txt", ".tiktoken")
    others = (hub.TRACKER, ".index.json")
    return sorted(f for f in folder.iterdir() if f.suffix in kinds and not f.name.endswith(others))


def _refuse_unsupported(raw: ConfigFile, architecture: Architecture) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise raw.unsupported(f"the activation {raw.get('hidden_act', '')!r} (silu is)", "hidden_act")
    if architecture.qkv_bias is not None and raw.get("attention_bias", False):
        raise raw.unsupported("a bias in the attention's output projection", "attention_bias")
    if raw.get("mlp_bias", False):
        raise raw.unsupported("a bias in the feed-forward layers", "mlp_bias")
    if raw.get("quantization_config", None):
        raise raw.unsupported("quantised weights; take the model in bfloat16", "quantization_config")
    for key in ("num_experts", "num_local_experts"):
        if architecture.experts is None and raw.get(key, 0):
            raise raw.unsupported("experts in a dense architecture", key)


def _given(known: bool | None, raw: ConfigFile, key: str) -> bool:
    return bool(raw.get(key, False)) if known is None else known


def _head_dim(raw: ConfigFile, architecture: Architecture) -> int:
    """Return the size of a head; files of Hunyuan on the hub have it under a name of their own."""
    default = architecture.head_dim or raw.integer("hidden_size") // raw.integer("num_attention_heads")
    return raw.integer("head_dim", raw.integer("attention_head_dim", default))


def _rope(raw: ConfigFile, architecture: Architecture) -> dict[str, Any]:
    """Return the rope settings: transformers 5 has them in `rope_parameters`, 4 in `rope_scaling` beside the base."""
    rope = raw.get("rope_scaling", raw.get("rope_parameters", {}))
    if not isinstance(rope, dict) or any(isinstance(x, dict) for x in rope.values()):
        raise raw.unsupported("rotary embeddings that differ by layer", "rope_parameters")
    if architecture.rotary_part is None and _rotary_part(raw, rope, architecture) != 1.0:
        raise raw.unsupported("rotary embeddings of a part of each head", "partial_rotary_factor")
    return rope


def _rotary_part(raw: ConfigFile, rope: dict[str, Any], architecture: Architecture) -> float:
    part = raw.number("partial_rotary_factor", architecture.rotary_part or 1.0, rope)
    if not 0 < part <= 1:
        raise UserError(f"must be above 0 and at most 1, not {part:g}", f"{raw.path}: partial_rotary_factor")
    return part


def _kind(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type", "default")))


def _larger_base(rope: dict[str, Any], architecture: Architecture) -> bool:
    return architecture.rope_alpha and _kind(rope) == "dynamic" and bool(rope.get("alpha"))


def _rope_base(raw: ConfigFile, rope: dict[str, Any], architecture: Architecture, head_dim: int) -> float:
    """Return the base of the rotary embedding, which an alpha enlarges; that does not depend on the length."""
    base = raw.number("rope_theta", architecture.rope_theta, rope)
    if _larger_base(rope, architecture):
        base *= math.pow(raw.number("alpha", 1.0, rope), head_dim / (head_dim - 2))
    return base


def _rope_factor(raw: ConfigFile, rope: dict[str, Any], architecture: Architecture) -> float | None:
    kind = _kind(rope)
    if kind == "default" or _larger_base(rope, architecture):
        return None
    if kind != "llama3":
        raise raw.unsupported(f"rope scaling of type {kind!r} (llama3 is)", "rope_parameters")
    # Megatron hard-codes these three.
    for key, value in {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}.items():
        if rope.get(key) != value:
            raise raw.unsupported(
                f"llama3 rope scaling with {key} {rope.get(key)} (Megatron has {value})", "rope_parameters"
            )
    if rope.get("factor") is None:
        raise raw.unsupported("llama3 rope scaling without a factor", "rope_parameters")
    return raw.number("factor", 1.0, rope)
