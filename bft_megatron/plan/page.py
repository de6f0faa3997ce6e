"""The memory of a step over its time as a page of its own: areas by part, drawn as SVG."""

from __future__ import annotations

from collections import Counter
from html import escape

from bft_megatron.plan.budget import PARTS, parts
from bft_megatron.plan.layout import Stage
from bft_megatron.plan.memory import gib
from bft_megatron.plan.plan import Plan

COLUMNS = 400
"""Moments that are drawn: of each stretch of the step the fullest."""
WIDTH, HEIGHT = 900, 320
COLOURS = dict(zip(PARTS, ("#4e79a7", "#a0cbe8", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#bab0ac"), strict=True))


def page(plan: Plan) -> str:
    """A whole HTML document, without anything from elsewhere."""
    keys = "".join(f'<li><i style="background:{colour}"></i>{name}</li>' for name, colour in COLOURS.items())
    charts = "".join(_chart(stage, plan.verdict.capacity) for stage in plan.stages)
    title = escape(f"{plan.recipe.model} on {plan.cluster.world} x {plan.cluster.gpu.name}")
    return (
        f"<!doctype html><meta charset=utf-8><title>{title}</title><style>body{{font:14px sans-serif;margin:2em}}"
        "li{display:inline-block;margin-right:1.5em}i{display:inline-block;width:1em;height:1em;margin-right:.4em}"
        f"</style><h1>{title}</h1><p>{plan.verdict.answer}: {plan.verdict.least:.1f} to {plan.verdict.most:.1f} of "
        f"{plan.verdict.capacity:g} GiB. Memory of one step, operator by operator from left to right; dashed, what the "
        f"GPU has.</p><ul>{keys}</ul>{charts}\n"
    )


def _chart(stage: Stage, capacity: float) -> str:
    moments = _moments(stage)
    top = max(capacity, gib(stage.trace.step.peak)) * 1.05
    below = [0.0] * len(moments)
    areas = []
    for name, colour in COLOURS.items():
        above = [low + gib(sizes[name]) for low, sizes in zip(below, moments, strict=True)]
        edge = [*enumerate(above), *reversed([*enumerate(below)])]
        points = " ".join(f"{i * WIDTH / len(moments):.1f},{HEIGHT * (1 - y / top):.1f}" for i, y in edge)
        areas.append(f'<polygon points="{points}" fill="{colour}"><title>{name}</title></polygon>')
        below = above
    line = HEIGHT * (1 - capacity / top)
    return (
        f"<h2>stage {stage.name}: {gib(stage.trace.step.peak):.1f} GiB, in {escape(stage.trace.step.peak_mark)}</h2>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">{"".join(areas)}'
        f'<line x1="0" x2="{WIDTH}" y1="{line:.1f}" y2="{line:.1f}" stroke="black" stroke-dasharray="6"/></svg>'
    )


_NOTHING: tuple[int, Counter[str]] = (-1, Counter())


def _moments(stage: Stage) -> list[dict[str, int]]:
    """The fullest moment of each of `COLUMNS` equal stretches of the step, in bytes by the report's parts."""
    deltas = stage.trace.step.deltas
    stretch = max(1, len(deltas) // COLUMNS)
    now: Counter[str] = Counter()
    total, fullest, found = 0, _NOTHING, []
    for i, (part, n) in enumerate(deltas, start=1):
        now[part] += n
        total += n
        if total > fullest[0]:
            fullest = total, now.copy()
        if i % stretch == 0:
            found.append(parts(fullest[1]))
            fullest = _NOTHING
    return found
