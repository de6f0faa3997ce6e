"""Whether a step's tensors fit a GPU: its peak, and allowances for what no tensor shows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from bft_megatron.plan.hardware import CPU, Gpu
from bft_megatron.plan.layout import Stage
from bft_megatron.plan.memory import gib

PARTS = {
    "weights": ("weights",),
    "gradients": ("gradients",),
    "optimizer": ("optimizer",),
    "activations": ("activations",),
    "head": ("head",),
    "communication": ("communication", "between passes"),
    "working": ("backward", "update", "other"),
}
"""A report's parts -> how the ledger's begin. `head`: logits and what the objective keeps; `working`: what lives within
a backward pass or an update."""
FIXED = ("weights", "gradients", "optimizer")
"""Allocated once: they do not fragment."""


@dataclass(frozen=True)
class Allowance:
    """GiB from least to most, beside PyTorch's tensors: customary figures, which depend on versions and nodes."""

    name: str
    least: float
    most: float


def allowances(stage: Stage, gpu: Gpu, world: int) -> list[Allowance]:
    """What a rank of this stage needs beside its tensors."""
    if gpu.name == CPU:
        return [Allowance("Python and its libraries", 0.6, 0.9)]
    moving = gib(sum(n for part, n in parts(stage.trace.step.at_peak).items() if part not in FIXED))
    return [
        Allowance("CUDA context", 0.5, 0.6),
        Allowance("NCCL's buffers", 0.5, 2.0) if world > 1 else Allowance("NCCL's buffers", 0.0, 0.0),
        Allowance("workspaces of cuBLAS and Transformer Engine", 0.05, 0.15),
        Allowance("fragments, of what comes and goes", 0.0, 0.05 * moving),
    ]


Answer = Literal["fits", "tight", "does not fit"]


@dataclass(frozen=True)
class Verdict:
    """How a world's fullest rank stands to its GPU. GiB."""

    answer: Answer
    stage: Stage
    """The fullest."""
    peak: float
    least: float
    most: float
    capacity: float

    @property
    def fits(self) -> bool:
        """Also with the most of every allowance."""
        return self.answer == "fits"


def verdict(stages: list[Stage], gpu: Gpu, world: int) -> Verdict:
    """`tight`: between the least and the most of the allowances."""
    fullest = max(stages, key=lambda stage: stage.trace.step.peak)
    beside = allowances(fullest, gpu, world)
    peak = gib(fullest.trace.step.peak)
    least, most = peak + sum(a.least for a in beside), peak + sum(a.most for a in beside)
    answer: Answer = "fits" if most <= gpu.memory else "tight" if least <= gpu.memory else "does not fit"
    return Verdict(answer, fullest, peak, least, most, gpu.memory)


def parts(by_part: Counter[str]) -> dict[str, int]:
    """The ledger's bytes by the report's parts."""
    return {
        name: sum(n for part, n in by_part.items() if part.startswith(beginnings)) for name, beginnings in PARTS.items()
    }
