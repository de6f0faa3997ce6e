"""The supported architectures: reading a Hugging Face `config.json` and turning it into Megatron's flags.

`weights` maps the tensors to Megatron's parameters. No torch here: a folder is read and refused before anything slow
starts. To add an architecture, add it to `ARCHITECTURES` and its own tensors to `weights`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bft_megatron.errors import UserError, reading, shortened
from bft_megatron.hf import hub
from bft_megatron.recipe.limits import INT32
from bft_megatron.textfiles import read_object

if TYPE_CHECKING:
    from megatron.training.models.gpt import GPTModelConfig


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's sizes and options, read from `config.json` by `read_config`."""

    architecture: str
    """Class name in transformers, such as `LlamaForCausalLM`."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab_size: int
    """Rows of the embedding in the files; Megatron's own embedding is padded."""
    tied: bool
    """Whether the output layer shares the embedding's weight."""
    rope_theta: float
    rope_factor: float | None
    """Factor of Llama 3's rotary frequency scaling; None: no scaling."""
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool
    """Whether query and key are normalised per head, before the rotary embedding."""
    window: int | None
    """Sliding window: number of tokens that a token attends to, itself included; None: full causal attention."""
    max_positions: int
    initializer_range: float
    dtype: str | None
    """Dtype of the files as the config names it, such as `bfloat16`."""


@dataclass(frozen=True)
class Architecture:
    """Properties of a transformers class that `config.json` has no field for, or may leave out."""

    window: Callable[[_Json], int | None] = lambda _: None
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    """Default if the config has no head_dim; None: hidden size / heads."""


def _mistral_window(raw: _Json) -> int | None:
    null = raw.values.get("sliding_window", 4096) is None  # no window, as since v0.2
    return None if null else raw.integer("sliding_window", 4096)


def _qwen_window(raw: _Json) -> int | None:
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


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(),  # Llama 2, 3, 3.1, 3.2, 3.3 and SmolLM2
    "Qwen2ForCausalLM": Architecture(window=_qwen_window, qkv_bias=True),  # and Qwen2.5
    "Qwen3ForCausalLM": Architecture(window=_qwen_window, qk_norm=True, head_dim=128),
    "MistralForCausalLM": Architecture(window=_mistral_window),
}


def read_config(folder: Path) -> ModelConfig:
    """Read `config.json` of a model folder, as written by transformers 4 or 5.

    Raises:
        UserError: no such folder or file, or an unsupported architecture or feature.
    """
    raw = _Json.of(folder)
    with reading(str(raw.path)):  # values of other types than a model's
        return _config(raw)


def _config(raw: _Json) -> ModelConfig:
    names = raw.get("architectures", [])
    if not isinstance(names, list) or len(names) != 1 or str(names[0]) not in ARCHITECTURES:
        shown = ", ".join(map(str, names)) if isinstance(names, list) else str(names)
        raise UserError(
            f"{shortened(shown) or 'no architecture'}: supported are {', '.join(ARCHITECTURES)}. For other models see "
            "Megatron-Bridge (https://github.com/NVIDIA-NeMo/Megatron-Bridge)",
            f"{raw.path}: architectures",
        )
    _refuse_unsupported(raw)
    architecture = ARCHITECTURES[names[0]]
    hidden, heads = raw.integer("hidden_size"), raw.integer("num_attention_heads")
    rope = _rope(raw)
    return ModelConfig(
        architecture=names[0],
        layers=raw.integer("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=raw.integer("num_key_value_heads", heads),
        head_dim=raw.integer("head_dim", architecture.head_dim or hidden // heads),
        ffn=raw.integer("intermediate_size"),
        vocab_size=raw.integer("vocab_size"),
        tied=bool(raw.get("tie_word_embeddings", False)),
        rope_theta=raw.number("rope_theta", 10000.0, rope),
        rope_factor=_rope_factor(raw, rope),
        norm_eps=raw.number("rms_norm_eps", 1e-6),
        qkv_bias=architecture.qkv_bias,
        qk_norm=architecture.qk_norm,
        window=architecture.window(raw),
        max_positions=raw.integer("max_position_embeddings"),
        initializer_range=raw.number("initializer_range", 0.02),
        dtype=raw.get("dtype", raw.get("torch_dtype", None)),
    )


def megatron_flags(config: ModelConfig) -> list[str]:
    """Return the model's part of Megatron's argument list; `configure` sets what flags cannot express.

    Megatron itself pads the vocabulary, to a multiple of `--make-vocab-size-divisible-by` x TP.
    """
    values = {
        "--num-layers": config.layers,
        "--hidden-size": config.hidden,
        "--ffn-hidden-size": config.ffn,
        "--num-attention-heads": config.heads,
        "--num-query-groups": config.kv_heads,
        "--kv-channels": config.head_dim,
        "--normalization": "RMSNorm",
        "--norm-epsilon": config.norm_eps,
        "--position-embedding-type": "rope",
        "--rotary-base": int(config.rope_theta),
        "--rotary-percent": 1.0,
        "--max-position-embeddings": config.max_positions,
        "--vocab-size": config.vocab_size,
        "--tokenizer-type": "NullTokenizer",  # the data set provides token ids
    }
    if config.window is not None:
        values["--window-size"] = f"{config.window - 1},0"  # Megatron does not count the token itself
    if config.rope_factor is not None:
        values["--rope-scaling-factor"] = config.rope_factor
    switches = {
        "--group-query-attention": True,
        "--swiglu": True,
        "--disable-bias-linear": True,
        "--add-qkv-bias": config.qkv_bias,
        "--qk-layernorm": config.qk_norm,
        "--use-rope-scaling": config.rope_factor is not None,
        "--untie-embeddings-and-output-weights": not config.tied,
    }
    return [*(str(x) for pair in values.items() for x in pair), *(name for name, on in switches.items() if on)]


def configure(model: GPTModelConfig, config: ModelConfig) -> None:
    """Set what Megatron's argument path drops or rounds: the rope scaling factor and a non-integer rotary base."""
    model.rotary_base = config.rope_theta
    if config.rope_factor is not None:
        model.rope_scaling_factor = config.rope_factor


def companions(folder: Path) -> list[Path]:
    """Return a model folder's files other than weights: configurations, tokenizer, chat template."""
    kinds = (".json", ".jinja", ".model", ".txt", ".tiktoken")
    others = (hub.TRACKER, ".index.json")
    return sorted(f for f in folder.iterdir() if f.suffix in kinds and not f.name.endswith(others))


def _refuse_unsupported(raw: _Json) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise raw.unsupported(f"the activation {raw.get('hidden_act', '')!r} (silu is)", "hidden_act")
    if raw.get("attention_bias", False):
        raise raw.unsupported("a bias in the attention's output projection", "attention_bias")
    if raw.get("mlp_bias", False):
        raise raw.unsupported("a bias in the feed-forward layers", "mlp_bias")
    if raw.get("quantization_config", None):
        raise raw.unsupported("quantised weights; take the model in bfloat16", "quantization_config")
    for key in ("num_experts", "num_local_experts"):
        if raw.get(key, 0):
            raise raw.unsupported("a mixture of experts", key)


def _rope(raw: _Json) -> dict[str, Any]:
    """Return the rope settings: transformers 5 has them in `rope_parameters`, 4 in `rope_scaling` beside the base."""
    rope = raw.get("rope_scaling", raw.get("rope_parameters", {}))
    if not isinstance(rope, dict) or any(isinstance(x, dict) for x in rope.values()):
        raise raw.unsupported("rotary embeddings that differ by layer", "rope_parameters")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise raw.unsupported("rotary embeddings of a part of each head", "partial_rotary_factor")
    return rope


def _rope_factor(raw: _Json, rope: dict[str, Any]) -> float | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
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


@dataclass(frozen=True)
class _Json:
    """A parsed `config.json`; its errors name file and key."""

    path: Path
    values: dict[str, Any]

    @classmethod
    def of(cls, folder: Path) -> _Json:
        path = folder / "config.json"
        if not folder.is_dir():
            raise UserError("no such model folder", str(folder))
        return cls(path, read_object(path))

    def get(self, key: str, default: Any) -> Any:
        """Return the value of `key`, or the default if it is missing or null, as in transformers."""
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or not 1 <= value <= INT32:
            raise UserError(f"must be a positive whole number, not {shortened(repr(value))}", f"{self.path}: {key}")
        return value

    def number(self, key: str, default: float, group: dict[str, Any] | None = None) -> float:
        """Return a finite number that is not negative, from a group of values if it has one."""
        value = (group or {}).get(key, self.get(key, default))
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise UserError(f"must be a finite number, not {shortened(repr(value))}", f"{self.path}: {key}")
        return float(value)

    def unsupported(self, what: str, key: str) -> UserError:
        return UserError(f"not supported: {what}", f"{self.path}: {key}")
