"""The pipeline stages of a layout that differ in memory or work, and the trace of one rank of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from bft_megatron.errors import UserError
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.plan import fake_step, processes
from bft_megatron.plan.probe import Trace
from bft_megatron.recipe.schema import Recipe


@dataclass(frozen=True)
class Stage:
    """Consecutive pipeline stages that share the trace of the first, which holds the most micro-batches."""

    first: int
    last: int
    trace: Trace

    @property
    def count(self) -> int:
        """Number of stages."""
        return self.last - self.first + 1

    @property
    def name(self) -> str:
        """The number of the stage, or the numbers of the first and the last."""
        return f"{self.first}" if self.count == 1 else f"{self.first}-{self.last}"


def stages(recipe: Recipe, config: ModelConfig, world: int, load: float = 1.0) -> list[Stage]:
    """Return all stages, each with the trace of one rank.

    One rank is enough, because all tensor, context and data parallel ranks of a stage have the same memory and work:
    of a mixture it is the rank whose experts receive `load` times the mean number of tokens.

    Raises:
        UserError: Megatron refuses the recipe or one of its flags.
    """
    [found] = of_each([recipe], config, world, _spans, load)
    return found


def ends(recipes: list[Recipe], config: ModelConfig, world: int, load: float = 1.0) -> list[list[Stage] | UserError]:
    """Return two stages of each recipe, the first (which stands for all but the last) and the last.

    Faster than `stages` and enough to compare layouts: the first holds the most micro-batches, the last the head. For a
    recipe that Megatron refuses, the result is the UserError instead.
    """
    return of_each(recipes, config, world, _end_spans, load, refusals=True)


def fullest_under(recipe: Recipe, config: ModelConfig, world: int, fullest: Stage, load: float) -> Stage:
    """Return the stage traced again, with another load of its experts."""
    [[found]] = of_each([recipe], config, world, lambda _: [(fullest.first, fullest.last)], load)
    return found


def of_each(
    recipes: list[Recipe],
    config: ModelConfig,
    world: int,
    spans: Callable[[Recipe], list[tuple[int, int]]],
    load: float = 1.0,
    *,
    refusals: bool = False,
) -> list[Any]:
    """Return the stages of each recipe, traced in child processes.

    Args:
        spans: returns the (first, last) of each group of stages; the first is traced.
        load: tokens that the traced rank's experts receive, over the mean of all ranks.
        refusals: return the UserError of a recipe that Megatron refuses in place of its stages.

    Raises:
        UserError: Megatron refuses a recipe; not with `refusals`.
    """
    import megatron.core.tokenizers.text  # imported here once, not in every child process
    import megatron.training.arguments
    import megatron.training.training  # noqa: F401

    torch.set_num_threads(1)  # a forked child must not inherit a thread pool
    jobs = [(i, span) for i, recipe in enumerate(recipes) for span in spans(recipe)]
    calls = []
    for i, (first, _) in jobs:
        recipe = recipes[i]
        traced = replace(recipe, train=replace(recipe.train, global_batch_size=_batch(recipe, world)))
        calls.append((traced, config, _rank(recipe, world, first), world, load))
    found: list[Any] = [[] for _ in recipes]
    for (i, span), trace in zip(jobs, processes.each(_trace, calls, refusals=refusals), strict=True):
        if isinstance(trace, UserError):
            found[i] = trace
        elif isinstance(found[i], list):
            found[i].append(Stage(*span, trace))
    return found


def micro_batches(recipe: Recipe, world: int) -> int:
    """Return the number of micro-batches in a step on each data-parallel rank."""
    return recipe.train.global_batch_size // (_data_parallel(recipe, world) * recipe.train.micro_batch_size)


def _trace(recipe: Recipe, config: ModelConfig, rank: int, world: int, load: float) -> Trace:
    return fake_step.run(recipe, config, rank, world, fake_step.full_rows(recipe), load)


def _spans(recipe: Recipe) -> list[tuple[int, int]]:
    """Return (first, last) of each group of equal stages: the middle ones have equal layers unless set by hand."""
    pipeline = recipe.parallel.pipeline
    if pipeline <= 4 or "pipeline-model-parallel-layout" in recipe.megatron:
        return [(stage, stage) for stage in range(pipeline)]
    return [(0, 0), (1, pipeline - 2), (pipeline - 1, pipeline - 1)]


def _end_spans(recipe: Recipe) -> list[tuple[int, int]]:
    last = recipe.parallel.pipeline - 1
    return [(0, last - 1), (last, last)] if last else [(0, 0)]


def _batch(recipe: Recipe, world: int) -> int:
    """Return the number of rows in the traced step.

    Twice as many micro-batches as stages fill the pipeline; more would only repeat its steady state.
    """
    held = min(micro_batches(recipe, world), 2 * recipe.parallel.pipeline)
    return held * _data_parallel(recipe, world) * recipe.train.micro_batch_size


def _data_parallel(recipe: Recipe, world: int) -> int:
    return world // recipe.parallel.model_parallel_size


def _rank(recipe: Recipe, world: int, stage: int) -> int:
    """Return the first rank of a stage, in Megatron's order."""
    if recipe.megatron.get("use-tp-pp-dp-mapping"):
        return stage * recipe.parallel.tensor * recipe.parallel.context
    return stage * (world // recipe.parallel.pipeline)
