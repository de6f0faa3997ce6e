"""A plan: the memory and time of a recipe's ranks on a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from bft_megatron.errors import UserError
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.plan.budget import Verdict, verdict
from bft_megatron.plan.estimate import Estimate, estimate
from bft_megatron.plan.hardware import Cluster
from bft_megatron.plan.layout import Stage, stages
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.folder import RunFolder
from bft_megatron.run.prepared import open_rows


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

    @property
    def days(self) -> float | None:
        """Return the estimated days of the whole run; None if steps or times are unknown."""
        return None if self.steps is None or self.estimate is None else self.steps * self.estimate.seconds / 86400


def plan(recipe: Recipe, config: ModelConfig, cluster: Cluster) -> Plan:
    """Trace one rank of every kind, compare its memory with the GPU's and estimate the time.

    Args:
        recipe: a recipe that was checked for the cluster's world.

    Raises:
        UserError: Megatron refuses the recipe.
    """
    traced = stages(recipe, config, cluster.world)
    return Plan(
        recipe,
        config,
        cluster,
        traced,
        verdict(traced, cluster.gpu, cluster.world),
        None if recipe.device == "cpu" else estimate(recipe, traced, cluster),
        steps(recipe),
    )


def steps(recipe: Recipe) -> int | None:
    """Return the steps of the whole run; None if they depend on data that are not prepared."""
    if recipe.train.iterations is not None:
        return recipe.train.iterations
    try:
        return open_rows(RunFolder.of(recipe).with_pack(recipe)).steps
    except UserError:
        return None
