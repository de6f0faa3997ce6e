"""Single changes that make a recipe fit, from the cheapest to the most costly, each with its own plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import batched
from typing import Any

from bft_megatron.errors import FieldError, UserError
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.plan import processes
from bft_megatron.plan.budget import Verdict, verdict
from bft_megatron.plan.hardware import Cluster
from bft_megatron.plan.layout import Stage, of_each
from bft_megatron.recipe import layout_rules, rules
from bft_megatron.recipe.schema import Recipe

ENOUGH = 3
"""Number of changes that a report names."""


@dataclass(frozen=True)
class Alternative:
    """A change of a recipe, its cost, and the memory that the changed recipe needs."""

    words: str
    """The override as written on the command line."""
    costs: str
    """The price of the change, in words."""
    verdict: Verdict


def changes(recipe: Recipe, config: ModelConfig, on: Cluster, fullest: Stage, load: float = 1.0) -> list[Alternative]:
    """Return the first `ENOUGH` single changes with which the fullest stage fits; if none does, the closest one."""
    at_end = fullest.first > 0 and fullest.last == recipe.parallel.pipeline - 1
    tried = (candidate for candidate in _candidates(recipe, config) if possible(candidate[2], config, on.world))
    found: list[Alternative] = []
    for some in batched(tried, processes.AT_ONCE):
        traced = of_each([t[2] for t in some], config, on.world, lambda r: [_span(r, at_end)], load, refusals=True)
        for (words, costs, _), stages in zip(some, traced, strict=True):
            if not isinstance(stages, UserError):
                found.append(Alternative(words, costs, verdict(stages, on.gpu, on.world)))
        if sum(change.verdict.fits for change in found) >= ENOUGH:
            break
    return [c for c in found if c.verdict.fits] or sorted(found, key=lambda c: c.verdict.peak)[:1]


def _span(recipe: Recipe, at_end: bool) -> tuple[int, int]:
    last = recipe.parallel.pipeline - 1
    return (last, last) if at_end else (0, last)


def _candidates(recipe: Recipe, config: ModelConfig) -> Iterator[tuple[str, str, Recipe]]:
    parallel, train = recipe.parallel, recipe.train
    if train.precision == "bf16" and not recipe.megatron.get("grad-reduce-in-bf16"):
        yield _with_flags(recipe, "gradients are summed in bf16", {"grad-reduce-in-bf16": True})
    if train.micro_batch_size > 1:
        changed = replace(recipe, train=replace(train, micro_batch_size=1))
        yield "train.micro_batch_size=1", "more, smaller kernels", changed
    if recipe.objective.head != "chunked":
        changed = replace(recipe, objective=replace(recipe.objective, head="chunked"))
        yield "objective.head=chunked", "the output layer's product is made twice", changed
    if not recipe.megatron.get("recompute-granularity"):
        everything = {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}
        yield _with_flags(recipe, "attention is computed twice", {"recompute-granularity": "selective"})
        yield _with_flags(recipe, "a third more computing", everything)
    experts = [("expert", "more messages to and from experts")] if config.experts is not None else []
    for name, costs in (
        *experts,
        ("context", "messages within attention; half the data-parallel ranks"),
        ("pipeline", "a longer pipeline to fill; half the data-parallel ranks"),
        ("tensor", "more messages in every layer; half the data-parallel ranks"),
    ):
        size = 2 * getattr(parallel, name)
        yield f"parallel.{name}={size}", costs, replace(recipe, parallel=replace(parallel, **{name: size}))


def _with_flags(recipe: Recipe, costs: str, flags: dict[str, Any]) -> tuple[str, str, Recipe]:
    words = " ".join(f"megatron.{name}={str(value).lower()}" for name, value in flags.items())
    return words, costs, replace(recipe, megatron=recipe.megatron | flags)


def possible(recipe: Recipe, config: ModelConfig, world: int) -> bool:
    """Return whether the recipe passes the checks of `recipe.rules`; Megatron may still refuse it."""
    try:
        rules.check_recipe(recipe, config)
        layout_rules.check_world(recipe, world)
    except FieldError:
        return False
    return True
