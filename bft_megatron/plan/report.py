"""What a plan says, as text and as JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from bft_megatron.announce import layout
from bft_megatron.plan.budget import PARTS, allowances, parts
from bft_megatron.plan.memory import gib
from bft_megatron.plan.plan import Plan


def as_json(plan: Plan) -> dict[str, Any]:
    """The whole plan; sizes in GiB, times in seconds."""
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
        "allowances_gib": {a.name: [a.least, _round(a.most)] for a in allowances(v.stage, plan.cluster.world)},
        "estimate": {
            "step_seconds": e.seconds,
            "kernels_seconds": e.kernels,
            "shown_communication_seconds": e.shown,
            "head_communication_seconds": e.head_shown,
            "bubble_seconds": e.bubble,
            "update_seconds": e.update,
            "tokens_per_second_per_gpu": e.tokens_per_second,
            "mfu": e.mfu,
            "model_flops": e.model_flops,
            "sent_gib": {group: _round(gib(n)) for group, n in e.sent.items()},
        },
    }


def parameters(plan: Plan) -> int:
    """Of the model as Megatron holds it, vocabulary padding and tied copies included."""
    return sum(stage.count * stage.trace.parameters for stage in plan.stages) * plan.recipe.parallel.tensor


def show(plan: Plan, console: Console) -> None:
    """Print the plan."""
    v, e, cluster = plan.verdict, plan.estimate, plan.cluster
    console.print(
        f"{plan.recipe.model} ({parameters(plan) / 1e9:.3g} B parameters held), {layout(plan.recipe, cluster.world)}, "
        f"{cluster.gpu.name}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_table(plan))
    beside = ", ".join(f"{a.name} {_range(a.least, a.most)}" for a in allowances(v.stage, cluster.world) if a.most)
    console.print(f"beside the tensors, allowed for: {beside} GiB", highlight=False, soft_wrap=True)
    console.print(
        f"[bold]{v.answer}[/]: {v.least:.1f} to {v.most:.1f} of {v.capacity:g} GiB, by the ranks of stage {v.stage.name}",
        highlight=False,
        soft_wrap=True,
    )
    shown = ", ".join(f"{group} {t:.2g}" for group, t in e.shown.items() if t)
    console.print(
        f"estimate, not measured: {e.seconds:.3g} s a step (kernels {e.kernels:.3g}, communication that shows "
        f"{shown or 0}, pipeline bubble {e.bubble:.2g}, update {e.update:.2g}), {e.tokens_per_second:,.0f} tokens/s a "
        f"GPU, {e.mfu:.0%} of its peak",
        highlight=False,
        soft_wrap=True,
    )


def _table(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("stage", "layers", *PARTS, "peak GiB"):
        table.add_column(heading, justify="right")
    for stage in plan.stages:
        step = stage.trace.step
        sizes = (f"{gib(n):.1f}" for n in parts(step.at_peak).values())
        table.add_row(stage.name, str(stage.trace.layers), *sizes, f"{gib(step.peak):.1f}")
    return table


def _range(least: float, most: float) -> str:
    return f"{least:.2g} to {most:.2g}" if least != most else f"{least:.2g}"


def _round(x: float) -> float:
    return round(x, 3)
