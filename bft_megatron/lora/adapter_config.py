"""PEFT's description of adapters, `adapter_config.json`: which modules and parameters of the base model they adapt.

transformers 5 joins the experts of a layer, and gate and up of each, in two parameters; the files of an adapter keep a
matrix an expert. `peft` joins their factors too as it reads them: gate and up become one adapter of twice the rank.
"""

from __future__ import annotations

from typing import Any

from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.lora.factors import adapted
from bft_megatron.recipe.schema import LoraSettings

NOT_TRANSLATED = {"Qwen2MoeForCausalLM", "Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"}
"""Mixtures of which `peft` 0.21 translates an adapter's factors, but not its description."""


def adapter_config(base: str, config: ModelConfig, lora: LoraSettings) -> dict[str, Any]:
    """Return the `adapter_config.json` of adapters of a base model, by its `config` and the recipe's `lora:`."""
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        **_targets(config, lora, alpha),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _targets(config: ModelConfig, lora: LoraSettings, alpha: float) -> dict[str, Any]:
    attention, networks, experts = _adapted_modules(config, lora)
    if config.experts is None or not experts | networks:
        return {"target_modules": _last(attention | networks)}
    if config.architecture not in NOT_TRANSLATED:
        # There `gate_proj` means the experts alone, whatever stands before it: other networks are named as parameters.
        parameters = sorted(f"{module}.weight" for module in networks)
        return {"target_modules": _last(attention | experts), "target_parameters": parameters}
    if not experts:
        return {"target_modules": _last(attention | networks)}
    joined = {"gate_up_proj" if "down" not in module else "down_proj" for module in _last(experts)}
    twice = "gate_up_proj" in joined
    return {
        "target_modules": _last(attention | networks),
        "target_parameters": sorted(f"mlp.experts.{name}" for name in joined),
        "rank_pattern": {"gate_up_proj": 2 * lora.rank} if twice else {},
        "alpha_pattern": {"gate_up_proj": 2 * alpha} if twice else {},
    }


def _adapted_modules(config: ModelConfig, lora: LoraSettings) -> tuple[set[str], set[str], set[str]]:
    """Return the last two parts of the names of the modules with adapters: attention's, networks' and experts'."""
    attention, networks, experts = set[str](), set[str](), set[str]()
    for entry in adapted(config, lora):
        for factors in entry.factors:
            parent, module = factors.a.tensors[0].name.removesuffix(".lora_A.weight").rsplit(".", 2)[-2:]
            of_attention = parent in ("self_attn", "linear_attn")
            kind = experts if entry.weight.expert is not None else attention if of_attention else networks
            kind.add(f"{parent}.{module}")
    return attention, networks, experts


def _last(modules: set[str]) -> list[str]:
    return sorted({module.rpartition(".")[2] for module in modules})
