"""The first lines of a run: a sentence on the training ahead, its estimated duration, and what it may not see."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch

from bft_megatron.data import windows
from bft_megatron.hf.weights import parameter_count
from bft_megatron.processes.device import current_device
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.resolved import Run

LONG_STEP = 12 * 3600
"""Seconds of a step from which on its length is more likely a slip than meant."""
TRAINING_SHARE = 0.35
"""Share of a device's matrix-multiplication speed that training reaches in a sensible layout."""


def sentence(run: Run, done: int) -> str:
    """Return a sentence with objective, model, steps, rows, tokens, supervised share, layout and estimated duration.

    The duration comes from a measurement of this device's speed.

    Args:
        done: steps that an earlier start of the run has completed.
    """
    recipe, rows = run.recipe, run.rows
    parameters, steps, batch = parameter_count(run.config), run.steps, recipe.train.global_batch_size
    counts = rows.train.counts
    tokens = rows.total * rows.train.tokens / rows.train.rows
    step_seconds = 6 * parameters * tokens / steps / _speed(run.world)
    warning = f"; warning: a step takes {_duration(step_seconds)}: is train.global_batch_size meant?"
    go_on = f" from step {done}" if done else ""
    return (
        f"{recipe.objective.name} on {Path(recipe.model).name} ({_short(parameters)} parameters): {steps} steps{go_on} "
        f"of {batch} rows x {recipe.data.seq_length:,} "
        f"({_short(tokens)} tokens, {counts.supervised / counts.tokens:.0%} "
        f"supervised), {describe_layout(recipe, run.world)}; {_duration(step_seconds * (steps - done))}"
        f"{warning if step_seconds > LONG_STEP else ''}"
    )


def notes(run: Run) -> list[str]:
    """Return sentences on the samples in which the objective finds no confidence window; none if there are none.

    Reads the masks of all training rows, some seconds for a billion tokens.
    """
    recipe, settings = run.recipe, run.recipe.objective
    if settings.name != "bft":
        return []
    chunks = recipe.parallel.context_chunks if settings.cp_windows == "per_rank" else 1
    found = windows.count(run.rows.train, settings.group_size, chunks)
    samples, size = run.rows.train.counts.samples, settings.group_size
    lost = (
        f"{found.lost:,} of {samples:,} samples have a window of {size} supervised tokens only across the chunks of "
        "context parallelism: objective.cp_windows=exact sees them"
    )
    short = (
        f"{found.short:,} of {samples:,} samples have fewer than {size} supervised tokens: their confidence is the "
        "mean over all of them"
    )
    return [lost] * (found.lost > 0) + [short] * (found.short > 0)


def describe_layout(recipe: Recipe, world: int) -> str:
    """Return the sizes above 1 of the parallel groups and the number of processes, as text."""
    p = recipe.parallel
    data = world // p.model_parallel_size
    sizes = {"TP": p.tensor, "PP": p.pipeline, "VP": p.virtual_pipeline, "CP": p.context, "DP": data}
    sizes |= {"EP": p.expert, "ETP": p.expert_tensor}
    names = [f"{name} {size}" for name, size in sizes.items() if size > 1] + ["SP"] * recipe.parallel.sequence_parallel
    return f"{' '.join(names) or 'no parallelism'} on {world} process{'es' if world > 1 else ''}"


def _speed(world: int) -> float:
    """Estimate the run's FLOP/s from a matrix product on this device, taking all devices as equal."""
    device = current_device()
    on_gpu = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    a = torch.ones(n, n, dtype=dtype, device=device)
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
