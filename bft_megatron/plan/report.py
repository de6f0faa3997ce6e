"""Reports of a plan, as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.plan.budget import PARTS, allowances, parts
from bft_megatron.plan.changes import Alternative
from bft_megatron.plan.memory import gib
from bft_megatron.plan.plan import Plan
from bft_megatron.reporting.announce import describe_layout


def as_json(plan: Plan, changes: list[Alternative]) -> dict[str, Any]:
    """Return the whole plan and the changes that would help; sizes in GiB, times in seconds."""
    v, e = plan.verdict, plan.estimate
    return {
        "fits": v.fits,
        "verdict": v.answer,
        "peak_gib": _round(v.peak),
        "needs_gib": [_round(v.least), _round(v.most)],
        "capacity_gib": v.capacity,
        "gpu": plan.cluster.gpu.name,
        "world_size": plan.cluster.world,
        "parameters": parameters(plan),
        "parts": {name: _round(gib(n)) for name, n in parts(v.stage.trace.step.at_peak).items()},
        "stages": [
            {
                "stages": [stage.first, stage.last],
                "layers": stage.trace.layers,
                "parameters": stage.trace.parameters,
                "peak_gib": _round(gib(stage.trace.step.peak)),
                "peak_in": stage.trace.step.peak_mark,
                "parts": {name: _round(gib(n)) for name, n in parts(stage.trace.step.at_peak).items()},
            }
            for stage in plan.stages
        ],
        "allowances_gib": {
            a.name: [a.least, _round(a.most)] for a in allowances(v.stage, plan.cluster.gpu, plan.cluster.world)
        },
        "changes": [{"set": c.words, "peak_gib": _round(c.verdict.peak), "fits": c.verdict.fits} for c in changes],
        "expert_load": plan.load,
        "by_load": [{"load": a, "peak_gib": _round(other.peak), "verdict": other.answer} for a, other in plan.by_load],
        "layout": asdict(plan.recipe.parallel),
        "estimate": None if e is None else asdict(e) | {"days": plan.days},
    }


def console() -> Console:
    """Return the console for reports, wide enough for the tables if the output is no terminal."""
    found = Console(emoji=False)
    return found if found.is_terminal else Console(width=120, emoji=False)


def parameters(plan: Plan) -> int:
    """Return the number of parameters that Megatron holds, with vocabulary padding and tied copies."""
    parallel = plan.recipe.parallel
    shared_out = sum(stage.count * stage.trace.expert_parameters for stage in plan.stages)
    rest = sum(stage.count * stage.trace.parameters for stage in plan.stages) - shared_out
    return rest * parallel.tensor + shared_out * parallel.expert * parallel.expert_tensor


def show(plan: Plan, console: Console) -> None:
    """Print the plan."""
    v, e, cluster = plan.verdict, plan.estimate, plan.cluster
    count = parameters(plan)
    held = f"{count / 1e9:.3g} B parameters held" if count >= 1e9 else f"{count / 1e6:.3g} M parameters held"
    held += _delta_nets(plan.config)
    layout = describe_layout(plan.recipe, cluster.world)
    _say(console, f"{escape(plan.recipe.model)} ({held}), {layout}, {cluster.gpu.name}")
    console.print(_table(plan))
    beside = ", ".join(
        f"{a.name} {_range(a.least, a.most)}" for a in allowances(v.stage, cluster.gpu, cluster.world) if a.most
    )
    _say(console, f"beside the tensors, allowed for: {beside} GiB")
    needs = f"{v.least:.1f} to {v.most:.1f} of {v.capacity:g} GiB"
    _say(
        console,
        f"[bold]{v.answer}[/]: {needs}, by the ranks of stage {v.stage.name}, in {v.stage.trace.step.peak_mark}",
    )
    if plan.by_load:
        others = ", ".join(f"{a:g}: {other.peak:.1f} GiB, {other.answer}" for a, other in plan.by_load)
        _say(console, f"with {plan.load:g} times the mean tokens on the fullest rank; peak by that load: {others}")
    if e is None:
        return
    shown = ", ".join(f"{group} {t:.2g}" for group, t in e.shown.items() if t >= 0.001) or "0"
    _say(
        console,
        f"an estimate, not measured: {e.seconds:.3g} s a step (kernels {e.kernels:.3g}; communication that shows: "
        f"{shown}; pipeline bubble {e.bubble:.2g}; update {e.update:.2g}), {e.tokens_per_second:,.0f} tokens/s a GPU, "
        f"{e.mfu:.0%} of its peak",
    )
    if plan.days is not None:
        _say(console, f"{plan.steps:,} steps: {plan.days:.2g} days")


def show_changes(changes: list[Alternative], console: Console) -> None:
    """Print the changes that would make the recipe fit, or come closest."""
    if not changes:
        console.print("no single change was found that Megatron accepts; --search looks for another layout")
        return
    fit = changes[0].verdict.fits
    console.print(
        "what fits, each alone:" if fit else "no single change fits; --search looks for another layout; the closest:"
    )
    for change in changes:
        _say(console, f"  {change.words}  (peak {change.verdict.peak:.1f} GiB; {change.costs})")


def show_layouts(plans: list[Plan], console: Console) -> None:
    """Print the layouts that a search found, the fastest that fit first."""
    table = Table(box=None, pad_edge=False)
    for heading in ("TP", "PP", "VP", "CP", "DP", "EP", "ETP", "peak GiB", "", "s a step", "tokens/s a GPU", "of peak"):
        table.add_column(heading, justify="right")
    for plan in plans:
        p, e, v = plan.recipe.parallel, plan.estimate, plan.verdict
        assert e is not None, "a search estimates every layout"
        data = plan.cluster.world // (p.tensor * p.pipeline * p.context)
        sizes = (str(n) for n in (p.tensor, p.pipeline, p.virtual_pipeline, p.context, data, p.expert, p.expert_tensor))
        speed = (f"{e.seconds:.3g}", f"{e.tokens_per_second:,.0f}", f"{e.mfu:.0%}")
        table.add_row(*sizes, f"{v.peak:.1f}", v.answer, *speed)
    console.print(table)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def _table(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("GiB of stage", "layers", *PARTS, "peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    digits = 1 if plan.verdict.peak >= 1 else 3
    for stage in plan.stages:
        step = stage.trace.step
        sizes = (f"{gib(n):.{digits}f}" for n in (*parts(step.at_peak).values(), step.peak))
        table.add_row(stage.name, str(stage.trace.layers), *sizes)
    return table


def _delta_nets(config: ModelConfig) -> str:
    net = config.linear_attention
    return "" if net is None else f", gated delta nets in {len(net.layers)} of {config.layers} layers"


def _range(least: float, most: float) -> str:
    return f"{least:.2g} to {most:.2g}" if least != most else f"{least:.2g}"


def _round(x: float) -> float:
    return round(x, 3)
