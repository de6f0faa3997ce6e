"""The first line of a run: in a sentence, what is about to happen and how long it may take."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch

from bft_megatron.hf.architectures import ModelConfig
from bft_megatron.hf.weights import parameter_count
from bft_megatron.recipe.rules import sequence_parallel
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.prepared import RunRows

TRAINING_SHARE = 0.35
"""The share of a device's matrix-multiplication speed that training reaches in a sensible layout."""


def sentence(recipe: Recipe, config: ModelConfig, rows: RunRows, world: int, done: int) -> str:
    """Objective, model, steps, rows, tokens, supervised share, layout, and a time of this device's own measure.

    Args:
        world: processes.
        done: steps that an earlier start of the run has behind it.
    """
    parameters = parameter_count(config)
    steps, batch = rows.steps(recipe), recipe.train.global_batch_size
    counts = rows.train.counts
    tokens = rows.rows(recipe) * rows.train.tokens / rows.train.rows
    left = tokens * (steps - done) / steps
    go_on = f" from step {done}" if done else ""
    return (
        f"{recipe.objective.name} on {Path(recipe.model).name} ({_short(parameters)} parameters): {steps} steps{go_on} "
        f"of {batch} rows x {recipe.data.seq_length:,} "
        f"({_short(tokens)} tokens, {counts.supervised / counts.tokens:.0%} "
        f"supervised), {describe_layout(recipe, world)}; {_duration(6 * parameters * left / _speed(world))}"
    )


def describe_layout(recipe: Recipe, world: int) -> str:
    """Return the sizes above 1 of the parallel groups and the number of processes, as text."""
    p = recipe.parallel
    data = world // (p.tensor * p.pipeline * p.context)
    sizes = {"TP": p.tensor, "PP": p.pipeline, "VP": p.virtual_pipeline, "CP": p.context, "DP": data}
    names = [f"{name} {size}" for name, size in sizes.items() if size > 1] + ["SP"] * sequence_parallel(recipe)
    return f"{' '.join(names) or 'no parallelism'} on {world} process{'es' if world > 1 else ''}"


def _speed(world: int) -> float:
    """Estimate the run's FLOP/s from a matrix product on this device, taking all devices as equal."""
    on_gpu = torch.ones((), device="cuda").is_cuda  # on the CPU "cuda" is the CPU
    n, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    a = torch.ones(n, n, dtype=dtype, device="cuda")
    best = math.inf
    for _ in range(3):
        start = time.monotonic()
        (a @ a)[0, 0].item()
        best = min(best, time.monotonic() - start)
    devices = world if on_gpu else min(world, len(os.sched_getaffinity(0)))
    return 2 * n**3 / best * devices * TRAINING_SHARE


def _duration(seconds: float) -> str:
    if seconds < 90:
        return "about a minute"
    if seconds < 5400:
        return f"about {round(seconds / 60)} minutes"
    return f"about {seconds / 3600:.0f} hours" if seconds < 2 * 86400 else f"about {seconds / 86400:.1f} days"


def _short(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"
