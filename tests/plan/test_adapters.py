"""A plan of adapters: those of hybrids and mixtures have the sizes that `lora.factors` gives them."""

from __future__ import annotations

import math

import pytest

from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.hf.weights import parameter_count
from bft_megatron.lora import factors
from bft_megatron.plan.known import model_config
from bft_megatron.plan.layout import stages
from bft_megatron.plan.probe import Trace
from bft_megatron.recipe import reader, rules
from bft_megatron.recipe.schema import Recipe
from tests.helpers.commands import ROOT

VOCAB_PADDING = 2 * 12 * 64
"""Numbers of both embeddings' rows beyond the tiny models' 500, up to a multiple of 128."""


def load(name: str, *overrides: str) -> tuple[Recipe, ModelConfig]:
    local = [f"model={ROOT / 'recipes' / name}", f"data.train={ROOT / 'recipes' / 'tiny' / 'train.jsonl'}"]
    own = [*local, "data.valid=null", "train.precision=bf16", "lora.rank=4"]
    made = reader.load(ROOT / "recipes" / f"{name}.yaml", [*own, *overrides])
    config = model_config(made.model)
    rules.check_recipe(made, config)
    return made, config


def trace(made: Recipe, config: ModelConfig) -> Trace:
    [stage] = stages(made, config, 1)
    return stage.trace


def sizes(made: Recipe, config: ModelConfig) -> dict[str, int]:
    """Return the numbers of a model's adapters by module."""
    found: dict[str, int] = {}
    for entry in factors.adapted(config, factors.settings_of(made)):
        for own in entry.factors:
            numbers = sum(math.prod(t.shape) for w in (own.a, *own.b) for t in w.tensors)
            found[own.module] = found.get(own.module, 0) + numbers
    return found


def check(made: Recipe, config: ModelConfig, own: dict[str, int]) -> None:
    """Hold a plan's parameters, gradients and optimizer state to its adapters."""
    planned, adapters = trace(made, config), sum(own.values())
    assert planned.parameters == parameter_count(config) + VOCAB_PADDING + adapters
    assert planned.at_rest["gradients"] == pytest.approx(4 * adapters, rel=0.05)
    assert planned.at_rest["optimizer"] == pytest.approx(12 * adapters, rel=0.05)


def test_the_adapters_of_a_hybrid():
    made, config = load("tiny_hybrid")
    own = sizes(made, config)
    assert own["in_proj_qkv"] == 3 * 4 * (64 + 4 * (16 + 16) + 8 * 16)  # 3 nets, rank 4: in + out
    check(made, config, own)


def test_the_adapters_of_a_mixture_on_one_rank():
    made, config = load("tiny_moe", "lora.experts=true")
    check(made, config, sizes(made, config))
