"""Search for the layouts of a cluster that fit and have the shortest estimated step.

There are too many layouts to trace all. One formula leaves out those whose states and activations exceed the GPU's
memory, another ranks the rest by time, and the most promising are traced.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from bft_megatron.checkpoint.sizes import OPTIMIZER_BYTES
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.hf.weights import parameter_count
from bft_megatron.plan.budget import verdict
from bft_megatron.plan.changes import possible
from bft_megatron.plan.estimate import estimate
from bft_megatron.plan.hardware import Cluster
from bft_megatron.plan.layout import ends, micro_batches
from bft_megatron.plan.plan import Plan
from bft_megatron.recipe.schema import ParallelSettings, Recipe

TRACED = 8
"""Number of layouts that a search traces."""


def search(recipe: Recipe, config: ModelConfig, on: Cluster) -> list[Plan]:
    """Return the plans of the most promising layouts: those that fit first, then by their estimated step."""
    chosen = sorted(candidates(recipe, config, on), key=lambda r: _rough_time(r, config, on))[:TRACED]
    plans = []
    for layout, found in zip(chosen, ends(chosen, config, on.world), strict=True):
        if isinstance(found, list):
            judged = verdict(found, on.gpu, on.world)
            took = estimate(layout, found, on)
            plans.append(Plan(layout, config, on, found, judged, took))
    return sorted(plans, key=lambda p: (not p.verdict.fits, p.estimate and p.estimate.seconds))


def candidates(recipe: Recipe, config: ModelConfig, on: Cluster) -> Iterator[Recipe]:
    """Yield every layout of powers of two that divides the model, the rows and the world, and may fit in memory."""
    powers = [1, 2, 4, 8, 16, 32]
    for tensor, pipeline, context in product((p for p in powers if p <= on.gpus_per_node), powers, powers):
        one_copy = tensor * pipeline * context
        if one_copy > on.world or on.world % one_copy:
            continue
        for virtual in range(1, config.layers // pipeline + 1) if pipeline > 1 else [1]:
            sizes = ParallelSettings(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, context=context)
            layout = replace(recipe, parallel=sizes)
            if possible(layout, config, on.world):
                held = _states(layout, config, on.world) + _activations(layout, config, on.world)
                if held < on.gpu.memory * 2**30:
                    yield layout


def _states(recipe: Recipe, config: ModelConfig, world: int) -> float:
    """Return the bytes of a rank's weights, gradients and optimizer state."""
    parallel = recipe.parallel
    own = parameter_count(config) / (parallel.tensor * parallel.pipeline)
    sharded = world / (parallel.tensor * parallel.pipeline)
    weight = 2 if recipe.train.precision == "bf16" else 4
    gradient = 2 if recipe.megatron.get("grad-reduce-in-bf16") else 4
    return own * (weight + gradient + OPTIMIZER_BYTES / sharded)


def _activations(recipe: Recipe, config: ModelConfig, world: int) -> float:
    """Return the bytes of activations that the first stage's layers keep in bf16, over all micro-batches in flight."""
    parallel = recipe.parallel
    if recipe.megatron.get("recompute-granularity") == "full":
        return 0.0
    norms = 4 * config.hidden  # input and output of both norms
    attention = 2 * (config.heads + config.kv_heads) * config.head_dim  # q, out; k, v
    kept = 2 * (norms + attention + 3 * config.ffn)  # gate, up and their product
    tokens = recipe.train.micro_batch_size * recipe.data.seq_length / parallel.context / parallel.tensor
    pipeline, virtual = parallel.pipeline, parallel.virtual_pipeline
    in_flight = pipeline if virtual == 1 else pipeline + (pipeline - 1) / virtual
    return min(in_flight, micro_batches(recipe, world)) * config.layers / pipeline * tokens * kept


def _rough_time(recipe: Recipe, config: ModelConfig, on: Cluster) -> float:
    """Estimate the seconds of a step from its large kernels and messages alone.

    The formula leaves out what makes short pipelines and chunks of a single layer slower.
    """
    parallel, tokens = recipe.parallel, recipe.train.global_batch_size * recipe.data.seq_length
    kernels = 6 * parameter_count(config) * tokens / (on.gpu.flops * 0.5) / on.world
    within = parallel.tensor * parallel.context <= on.gpus_per_node
    layers = config.layers / parallel.pipeline
    own_tokens = tokens * parallel.tensor * parallel.pipeline / on.world
    message = own_tokens * config.hidden * 2 / on.gpu.nvlink
    tensor = 6 * layers * message * (parallel.tensor - 1) / parallel.tensor
    key_values = 2 * config.kv_heads * config.head_dim / config.hidden / parallel.tensor
    ring = (
        3 * layers * message * key_values * (parallel.context - 1) * (1 if within else on.gpu.nvlink / on.gpu.network)
    )
    total = micro_batches(recipe, on.world)
    bubble = (parallel.pipeline - 1) / parallel.virtual_pipeline / total
    return (kernels + tensor + ring) * (1 + bubble)
