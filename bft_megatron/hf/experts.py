"""Reading the experts of a mixture from a model's `config.json`, one function an architecture."""

from __future__ import annotations

from bft_megatron.hf.config_file import ConfigFile
from bft_megatron.hf.model_config import ExpertNames, Experts

MIXTRAL_NAMES = ExpertNames("block_sparse_moe.gate", "block_sparse_moe.experts.{expert}.{matrix}", ("w1", "w3", "w2"))


def qwen3_moe(raw: ConfigFile) -> Experts:
    """Return the experts of `Qwen3MoeForCausalLM`: no shared network, dense layers where the config says so."""
    return Experts(
        count=_count(raw, 128),
        per_token=raw.integer("num_experts_per_tok", 8),
        ffn=raw.integer("moe_intermediate_size", 768),
        scores="softmax of chosen" if raw.get("norm_topk_prob", False) else "softmax of all",
        dense_layers=_qwen_dense_layers(raw),
    )


def qwen2_moe(raw: ConfigFile) -> Experts:
    """Return the experts of `Qwen2MoeForCausalLM`: as Qwen3's, with a gated shared network."""
    return Experts(
        count=_count(raw, 60),
        per_token=raw.integer("num_experts_per_tok", 4),
        ffn=raw.integer("moe_intermediate_size", 1408),
        scores="softmax of chosen" if raw.get("norm_topk_prob", False) else "softmax of all",
        dense_layers=_qwen_dense_layers(raw),
        shared_ffn=raw.integer("shared_expert_intermediate_size", 5632),
        shared_gate=True,
    )


def mixtral(raw: ConfigFile) -> Experts:
    """Return the experts of `MixtralForCausalLM`, as wide as a dense model's network."""
    return Experts(
        count=_count(raw, 8),
        per_token=raw.integer("num_experts_per_tok", 2),
        ffn=raw.integer("intermediate_size"),
        scores="softmax of chosen",
        names=MIXTRAL_NAMES,
    )


def _count(raw: ConfigFile, default: int) -> int:
    """Return the number of experts: transformers 5 writes `num_local_experts`, files of the hub have `num_experts`."""
    return raw.integer("num_local_experts", raw.integer("num_experts", default))


def _qwen_dense_layers(raw: ConfigFile) -> tuple[int, ...]:
    step, listed = raw.integer("decoder_sparse_step", 1), raw.get("mlp_only_layers", [])
    layers = range(raw.integer("num_hidden_layers"))
    return tuple(i for i in layers if i in listed or (i + 1) % step)
