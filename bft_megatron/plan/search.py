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


def search(recipe: Recipe, config: ModelConfig, on: Cluster, load: float = 1.0) -> list[Plan]:
    """Return the plans of the most promising layouts: those that fit first, then by their estimated step."""
    chosen = sorted(candidates(recipe, config, on), key=lambda r: _rough_time(r, config, on))[:TRACED]
    plans = []
    for layout, found in zip(chosen, ends(chosen, config, on.world, load), strict=True):
        if isinstance(found, list):
            judged = verdict(found, on.gpu, on.world)
            took = estimate(layout, found, on, load)
            plans.append(Plan(layout, config, on, found, judged, took, load=load))
    return sorted(plans, key=lambda p: (not p.verdict.fits, p.estimate and p.estimate.seconds))


def candidates(recipe: Recipe, config: ModelConfig, on: Cluster) -> Iterator[Recipe]:
    """Yield every layout of powers of two that divides the model, the rows and the world, and may fit in memory."""
    powers = [1, 2, 4, 8, 16, 32]
    for tensor, pipeline, context in product((p for p in powers if p <= on.gpus_per_node), powers, powers):
        one_copy = tensor * pipeline * context
        if one_copy > on.world or on.world % one_copy:
            continue
        virtuals = range(1, config.layers // pipeline + 1) if pipeline > 1 else [1]
        for virtual, expert in product(virtuals, _expert_sizes(config, on.world // pipeline)):
            sizes = ParallelSettings(
                tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, context=context, expert=expert
            )
            layout = replace(recipe, parallel=sizes)
            if possible(layout, config, on.world):
                held = _states(layout, config, on.world) + _activations(layout, config, on.world)
                if held < on.gpu.memory * 2**30:
                    yield layout


def _expert_sizes(config: ModelConfig, ranks: int) -> list[int]:
    """Return the powers of two by which expert parallelism may share out the experts over a stage's ranks."""
    if config.experts is None:
        return [1]
    return [n for n in (1 << i for i in range(10)) if ranks % n == 0 and config.experts.count % n == 0]


def _states(recipe: Recipe, config: ModelConfig, world: int) -> float:
    """Return the bytes of a rank's weights, gradients and optimizer state."""
    parallel = recipe.parallel
    ranks = world / parallel.pipeline
    experts = _expert_parameters(config) / parallel.pipeline
    rest = parameter_count(config) / parallel.pipeline - experts
    weight = 2 if recipe.train.precision == "bf16" else 4
    gradient = 2 if recipe.megatron.get("grad-reduce-in-bf16") else 4
    held = rest / parallel.tensor + experts / (parallel.expert * parallel.expert_tensor)
    return held * (weight + gradient) + (rest + experts) / ranks * OPTIMIZER_BYTES


def _expert_parameters(config: ModelConfig) -> int:
    """Return the number of parameters of all layers' experts."""
    if config.experts is None:
        return 0
    layers = sum(map(config.has_experts, range(config.layers)))
    return layers * config.experts.count * 3 * config.hidden * config.experts.ffn


def _active_parameters(config: ModelConfig) -> float:
    """Return the number of parameters that a token meets."""
    idle = 0.0 if config.experts is None else 1 - config.experts.per_token / config.experts.count
    return parameter_count(config) - idle * _expert_parameters(config)


def _activations(recipe: Recipe, config: ModelConfig, world: int) -> float:
    """Return the bytes of activations that the first stage's layers keep in bf16, over all micro-batches in flight."""
    parallel = recipe.parallel
    if recipe.megatron.get("recompute-granularity") == "full":
        return 0.0
    norms = 4 * config.hidden  # input and output of both norms
    kept = 2 * (norms + _attention_width(config) + 3 * _width(config))  # gate, up and their product
    tokens = recipe.train.micro_batch_size * recipe.data.seq_length / parallel.context / parallel.tensor
    pipeline, virtual = parallel.pipeline, parallel.virtual_pipeline
    in_flight = pipeline if virtual == 1 else pipeline + (pipeline - 1) / virtual
    return min(in_flight, micro_batches(recipe, world)) * config.layers / pipeline * tokens * kept


def _attention_width(config: ModelConfig) -> float:
    """Return the numbers of a token that attention or a gated delta net keeps, the mean of all layers."""
    attention = 2 * (config.heads + config.kv_heads) * config.head_dim  # q, out; k, v
    attention += 2 * config.heads * config.head_dim if config.output_gate else 0  # the gate, the gated output
    net = config.linear_attention
    if net is None:
        return attention
    keys, values = net.key_heads * net.key_dim, net.value_heads * net.value_dim
    # In: q, k, v, gate. The rule: q and k of each key head and of each value head; v, gate, output, gated output.
    rule = (2 * keys + 2 * values) + (2 * keys + 2 * net.value_heads * net.key_dim) + 4 * values
    part = len(net.layers) / config.layers
    return part * rule + (1 - part) * attention


def _width(config: ModelConfig) -> int:
    """Return the feed-forward columns that a token meets in a layer."""
    experts = config.experts
    return config.ffn if experts is None else experts.per_token * experts.ffn + experts.shared_ffn


def _rough_time(recipe: Recipe, config: ModelConfig, on: Cluster) -> float:
    """Estimate the seconds of a step from its large kernels and messages alone.

    The formula leaves out what makes short pipelines and chunks of a single layer slower.
    """
    parallel, tokens = recipe.parallel, recipe.train.global_batch_size * recipe.data.seq_length
    kernels = 6 * _active_parameters(config) * tokens / (on.gpu.flops * 0.5) / on.world
    within = parallel.tensor * parallel.context <= on.gpus_per_node
    layers = config.layers / parallel.pipeline
    own_tokens = tokens * parallel.tensor * parallel.pipeline / on.world
    message = own_tokens * config.hidden * 2 / on.gpu.nvlink
    tensor = 6 * layers * message * (parallel.tensor - 1) / parallel.tensor
    slower = 1 if within else on.gpu.nvlink / on.gpu.network
    context = layers * message * _rough_context(config, parallel) * slower
    total = micro_batches(recipe, on.world)
    bubble = (parallel.pipeline - 1) / parallel.virtual_pipeline / total
    return (kernels + tensor + context + _rough_exchange(layers * message, config, on, parallel)) * (1 + bubble)


def _rough_context(config: ModelConfig, parallel: ParallelSettings) -> float:
    """Estimate what a rank sends over CP in a layer's passes, the mean of all layers, in its hidden states over TP."""
    size, width = parallel.context, config.hidden * parallel.tensor
    ring = 3 * (size - 1) * 2 * config.kv_heads * config.head_dim / width
    net = config.linear_attention
    if net is None:
        return ring
    into = 2 * (net.key_heads * net.key_dim + net.value_heads * net.value_dim)
    exchange = 2 * (size - 1) / size * (into + net.value_heads * net.value_dim) / width
    part = len(net.layers) / config.layers
    return part * exchange + (1 - part) * ring


def _rough_exchange(hidden_states: float, config: ModelConfig, on: Cluster, parallel: ParallelSettings) -> float:
    """Estimate the seconds of tokens' ways to experts and back, in both passes.

    Args:
        hidden_states: seconds that all layers' hidden states of a TP group take within a node.
    """
    if config.experts is None:
        return 0.0
    ranks = parallel.expert * parallel.expert_tensor
    slower = 1 if ranks <= on.gpus_per_node else on.gpu.nvlink / on.gpu.network
    return 4 * config.experts.per_token * hidden_states / parallel.tensor * (ranks - 1) / ranks * slower
