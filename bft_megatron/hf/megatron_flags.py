"""A model's part of Megatron's argument list."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bft_megatron.hf.model_config import Experts, ModelConfig

if TYPE_CHECKING:
    from megatron.training.models.gpt import GPTModelConfig


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
        "--rotary-percent": config.rotary_part,
        "--max-position-embeddings": config.max_positions,
        "--vocab-size": config.vocab_size,
        "--tokenizer-type": "NullTokenizer",  # the data set provides token ids
    }
    values |= _expert_values(config) | _linear_attention_values(config)
    if config.window is not None:
        values["--window-size"] = f"{config.window - 1},0"  # Megatron does not count the token itself
    if config.rope_factor is not None:
        values["--rope-scaling-factor"] = config.rope_factor
    switches = {
        "--group-query-attention": True,
        "--swiglu": True,
        "--disable-bias-linear": True,
        "--add-qkv-bias": config.qkv_bias,
        "--qk-layernorm": config.qk_norm and not config.norm_after_rotary,
        "--attention-output-gate": config.output_gate,
        "--apply-layernorm-1p": config.zero_centred_norms,
        "--use-rope-scaling": config.rope_factor is not None,
        "--untie-embeddings-and-output-weights": not config.tied,
        **_expert_switches(config.experts),
    }
    return [*(str(x) for pair in values.items() for x in pair), *(name for name, on in switches.items() if on)]


def _expert_values(config: ModelConfig) -> dict[str, str | int | float]:
    experts = config.experts
    if experts is None:
        return {}
    values: dict[str, str | int | float] = {
        "--num-experts": experts.count,
        "--moe-ffn-hidden-size": experts.ffn,
        "--moe-router-topk": experts.per_token,
        "--moe-router-dtype": "fp32",  # under bf16 the choice of experts would depend on rounding
    }
    if experts.dense_layers:  # a list stores each layer under a key of its own, so it is given only where needed
        values["--moe-layer-freq"] = f"[{','.join(str(int(config.has_experts(i))) for i in range(config.layers))}]"
    if experts.shared_ffn:
        values["--moe-shared-expert-intermediate-size"] = experts.shared_ffn
    if experts.scores == "sigmoid":
        values["--moe-router-score-function"] = "sigmoid"
    if experts.scale != 1.0:
        values["--moe-router-topk-scaling-factor"] = experts.scale
    if experts.groups > 1:
        values |= {
            "--moe-router-num-groups": experts.groups,
            "--moe-router-group-topk": experts.groups_per_token,
        }
    if experts.names.correction:
        values["--moe-router-bias-update-rate"] = 0.0  # the bias of the files, which training does not change
    return values


def _linear_attention_values(config: ModelConfig) -> dict[str, str | int | float]:
    net = config.linear_attention
    if net is None:
        return {}
    kinds = ",".join(str(int(config.has_linear_attention(i))) for i in range(config.layers))
    return {
        "--experimental-attention-variant": "gated_delta_net",
        "--linear-attention-freq": f"[{kinds}]",
        "--linear-conv-kernel-dim": net.taps,
        "--linear-key-head-dim": net.key_dim,
        "--linear-value-head-dim": net.value_dim,
        "--linear-num-key-heads": net.key_heads,
        "--linear-num-value-heads": net.value_heads,
    }


def _expert_switches(experts: Experts | None) -> dict[str, bool]:
    if experts is None:
        return {}
    return {
        "--moe-router-pre-softmax": experts.scores == "softmax of all",
        "--moe-shared-expert-gate": experts.shared_gate,
        "--moe-router-enable-expert-bias": bool(experts.names.correction),
    }


def configure(model: GPTModelConfig, config: ModelConfig) -> None:
    """Set what Megatron's argument path drops or rounds: the rope scaling factor and a non-integer rotary base."""
    model.rotary_base = config.rope_theta
    if config.rope_factor is not None:
        model.rope_scaling_factor = config.rope_factor
