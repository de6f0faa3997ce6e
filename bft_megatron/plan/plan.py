"""A plan: a recipe, a world of GPUs, and what their ranks hold and may take."""

from __future__ import annotations

from dataclasses import dataclass

from bft_megatron.hf.architectures import ModelConfig
from bft_megatron.plan.budget import Verdict, verdict
from bft_megatron.plan.estimate import Estimate, estimate
from bft_megatron.plan.hardware import Cluster
from bft_megatron.plan.layout import Stage, stages
from bft_megatron.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """What is known of a recipe on a cluster."""

    recipe: Recipe
    config: ModelConfig
    cluster: Cluster
    stages: list[Stage]
    verdict: Verdict
    estimate: Estimate


def plan(recipe: Recipe, config: ModelConfig, cluster: Cluster) -> Plan:
    """Trace the ranks that differ, and judge them.

    Args:
        recipe: checked for the cluster's world.

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
        estimate(recipe, traced, cluster.gpu, cluster.world, cluster.gpus_per_node),
    )
