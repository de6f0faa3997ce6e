"""A plan: the memory and time of a recipe's ranks on a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from bft_megatron.errors import UserError
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.plan.budget import Verdict, verdict
from bft_megatron.plan.estimate import Estimate, estimate
from bft_megatron.plan.hardware import Cluster
from bft_megatron.plan.layout import Stage, fullest_under, stages
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.folder import RunFolder
from bft_megatron.run.prepared import open_rows

LOADS = (1.0, 2.0, 4.0)
"""Loads of a mixture's experts whose memory a plan compares."""


@dataclass(frozen=True)
class Plan:
    """A recipe on a cluster: its traced stages, the verdict and the time estimate."""

    recipe: Recipe
    config: ModelConfig
    cluster: Cluster
    stages: list[Stage]
    verdict: Verdict
    estimate: Estimate | None
    """None for a run on the CPU."""
    steps: int | None = None
    """Steps of the whole run; None unless the recipe gives them or its data are prepared."""

    load: float = 1.0
    """Tokens that the fullest rank's experts receive, over the mean of all ranks."""
    by_load: tuple[tuple[float, Verdict], ...] = ()
    """The verdicts under `LOADS`, by the fullest stage; empty for a dense model."""

    @property
    def days(self) -> float | None:
        """Return the estimated days of the whole run; None if steps or times are unknown."""
        return None if self.steps is None or self.estimate is None else self.steps * self.estimate.seconds / 86400


def plan(recipe: Recipe, config: ModelConfig, cluster: Cluster, load: float = 1.0, *, compare: bool = False) -> Plan:
    """Trace one rank of every kind, compare its memory with the GPU's and estimate the time.

    Args:
        recipe: a recipe that was checked for the cluster's world.
        load: tokens that the fullest rank's experts receive, over the mean of all ranks.
        compare: trace a mixture under `LOADS` too.

    Raises:
        UserError: Megatron refuses the recipe.
    """
    traced = stages(recipe, config, cluster.world, load)
    judged = verdict(traced, cluster.gpu, cluster.world)
    loads = LOADS if compare and config.experts is not None else ()
    others = [fullest_under(recipe, config, cluster.world, judged.stage, other) for other in loads]
    return Plan(
        recipe,
        config,
        cluster,
        traced,
        judged,
        None if recipe.device == "cpu" else estimate(recipe, traced, cluster, load),
        steps(recipe),
        load,
        tuple((a, verdict([stage], cluster.gpu, cluster.world)) for a, stage in zip(loads, others, strict=True)),
    )


def steps(recipe: Recipe) -> int | None:
    """Return the steps of the whole run; None if they depend on data that are not prepared."""
    if recipe.train.iterations is not None:
        return recipe.train.iterations
    try:
        return open_rows(RunFolder.of(recipe).with_pack(recipe)).steps
    except UserError:
        return None
