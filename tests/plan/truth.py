"""The truth that a plan is held to: real gloo processes in Megatron's own loop, and what torch's allocator says.

The allocator is asked through the profiler's memory events, never through the ledger that the plan itself is made by;
of a ledger over the real run only the collectives are taken. The profiler sees one thread, and what a collective is
given may die in gloo's own, and then never seem to go: so it is held until the next collective, and a balance is
compared with one of a moment before, not with zero.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.plan import fake_step
from bft_megatron.plan.fake_step import kind_of_group
from bft_megatron.plan.memory import Collective, Ledger
from bft_megatron.plan.probe import Trace
from bft_megatron.plan.processes import each
from bft_megatron.processes.terminal import output_to
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.folder import RunFolder
from bft_megatron.run.prepared import RunRows
from bft_megatron.run.resolved import Run
from bft_megatron.training import datasets, loop
from tests.helpers.world import run_world


@dataclass(frozen=True)
class Sizes:
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int
    saved: int
    """By the first micro-batch of the second step."""
    rise: int
    """Of the second step, from its start to its peak."""
    collectives: Counter[Collective]
    """Of the second step."""

    @property
    def peak(self) -> int:
        """Of the second step."""
        return self.weights + self.gradients + self.optimizer + self.rise


def real(recipe: Recipe, config: ModelConfig, rows: RunRows, world: int) -> list[Sizes]:
    """Two steps of a run on real processes, by rank."""
    return run_world(world, _profiled, recipe, config, rows, megatron=True, timeout=600)


def planned(recipe: Recipe, config: ModelConfig, rows: RunRows, world: int, ranks: list[int]) -> list[Sizes]:
    """The same two steps, planned, of some of the ranks."""
    run = Run(recipe, config, Path(recipe.model), replace(rows, valid=None), world)
    calls = [(recipe, config, rank, world, datasets.datasets(run)) for rank in ranks]
    return [_sizes(trace) for trace in each(fake_step.run, calls)]


def _sizes(trace: Trace) -> Sizes:
    return Sizes(
        trace.at_rest["weights"],
        trace.at_rest["gradients"],
        trace.at_rest["optimizer"],
        trace.after_forward,
        trace.step.peak - trace.at_rest.total(),
        _without_phases(trace.step.collectives),
    )


def _without_phases(collectives: Counter[tuple[str, Collective]]) -> Counter[Collective]:
    found: Counter[Collective] = Counter()
    for (_, collective), n in collectives.items():
        found[replace(collective, head=False)] += n  # the ledger of a real run knows no parts
    return found


class _RealLedger(Ledger):
    """Of a run whose tensors have values. Holds what a collective was given until the next: gloo lets go first."""

    def _collective(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        result = super()._collective(func, args, kwargs, tensors)
        self._held = result, tensors
        return result


class _TwoSteps(BaseException):
    """Ends a run after its second step."""


def _profiled(recipe: Recipe, config: ModelConfig, rows: RunRows) -> Sizes:
    ledger = _RealLedger("cpu", kind_of_group, real=True)
    recorder = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    if config.experts is not None:
        _balance_routing()
    with output_to(RunFolder.of(recipe).log(int(os.environ["RANK"]))) as console, recorder, ledger:
        _mark_moments(ledger)
        with contextlib.suppress(_TwoSteps):
            loop.train(Run(recipe, config, Path(recipe.model), rows, dist.get_world_size()), console)
    moments = _Moments(recorder)
    return Sizes(
        weights=moments.grown("setup", "model"),
        gradients=moments.grown("setup", "optimizer") - moments.grown("setup", "model"),
        optimizer=moments.grown("optimizer", "optimizer done") + moments.grown_in_all("adam"),
        saved=moments.grown("forward", "forward done"),
        rise=moments.highest("step 2", "step 2 done") - moments.at("step 2"),
        collectives=_without_phases(ledger.step.collectives),
    )


def _balance_routing() -> None:
    """Let each token of a rank go to the next experts in turn, whatever its router says."""
    from bft_megatron.training import routers

    spread = routers.spread

    def balanced(probs: Tensor, chosen: Tensor, padding: Tensor, top: int) -> tuple[Tensor, Tensor]:
        weights, chosen = spread(probs, chosen, padding, top)
        tokens, experts = chosen.shape
        chosen.zero_().scatter_(1, torch.arange(tokens * top).remainder(experts).view(tokens, top), True)
        return weights, chosen

    routers.spread = balanced


def _mark_moments(ledger: Ledger) -> None:
    """Let Megatron's functions say when they begin and end."""
    from megatron.core.pipeline_parallel import schedules
    from megatron.training import training
    from megatron.training.models import dist_utils

    steps = 0

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 2:
            gc.collect()  # cycles of what the first step left
            ledger.begin()
            _mark("step 2")
        result = train_step(*args, **kwargs)
        if steps == 2:
            _mark("step 2 done")
            raise _TwoSteps
        return result

    def forward(*args: Any, **kwargs: Any) -> Any:
        if steps == 2:
            _mark("forward")
        result = forward_step(*args, **kwargs)
        if steps == 2:
            _mark("forward done")
        return result

    train_step, forward_step = training.train_step, schedules.forward_step
    training.train_step, schedules.forward_step = step, forward
    _mark_around(training, "setup_model_and_optimizer", "setup")
    _mark_around(dist_utils, "_ddp_wrap", "model")
    _mark_around(training, "get_megatron_optimizer", "optimizer")
    _mark_around(torch.optim.AdamW, "step", "adam")  # once one was built, AdamW has a step of its own


def _mark_around(owner: Any, name: str, what: str) -> None:
    call = getattr(owner, name)

    @functools.wraps(call)
    def called(*args: Any, **kwargs: Any) -> Any:
        _mark(what)
        result = call(*args, **kwargs)
        _mark(f"{what} done")
        return result

    setattr(owner, name, called)


def _mark(what: str) -> None:
    with record_function(f"moment: {what}"):
        pass


class _Moments:
    """The allocator's balance over time; of a moment that comes more than once, the first."""

    def __init__(self, recorder: profile) -> None:
        events = sorted(recorder.profiler.kineto_results.events(), key=lambda e: e.start_ns())
        self.balance, self.times, self.all, now = [], {}, defaultdict(list), 0
        for event in events:
            if event.name() == "[memory]":
                now += event.nbytes()
                self.balance.append(now)
            elif event.name().startswith("moment: "):
                self.all[event.name().removeprefix("moment: ")].append(now)
                self.times.setdefault(event.name().removeprefix("moment: "), len(self.balance))

    def at(self, moment: str) -> int:
        place = self.times[moment]
        return self.balance[place - 1] if place else 0

    def grown(self, start: str, end: str) -> int:
        return self.at(end) - self.at(start)

    def grown_in_all(self, what: str) -> int:
        """The growth within all moments of the name: experts may have an optimizer of their own."""
        return sum(self.all[f"{what} done"]) - sum(self.all[what])

    def highest(self, start: str, end: str) -> int:
        return max(self.balance[self.times[start] : self.times[end]])
