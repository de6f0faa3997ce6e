"""What the objective must give: plain float64, one sample and one token after the other, no code of the package."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

NONE = -100


def logprobs(logits: Tensor, targets: Tensor, vocab_size: int | None = None) -> Tensor:
    """[..., v] any dtype (with its graph), [...] -> log p of the targets in float64, 0 where there is none."""
    whole = logits.double()[..., :vocab_size].log_softmax(-1)
    return whole.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets != NONE)


def split(sample: Sequence[int], cp: int) -> list[list[int]]:
    """A sample's positions -> its 2*cp chunks (one for cp 1)."""
    count = 2 * cp if cp > 1 else 1
    size = len(sample) // count
    return [list(sample[i * size : (i + 1) * size]) for i in range(count)]


def held(edges: Sequence[int], cp: int, rank: int) -> list[int]:
    """The positions of a context-parallel rank."""
    if cp == 1:
        return list(range(edges[-1]))
    positions = []
    for start, end in pairwise(edges):
        chunks = split(range(start, end), cp)
        positions += chunks[rank] + chunks[2 * cp - 1 - rank]
    return positions


def windows(values: Sequence[float], g: int) -> list[float]:
    """Trailing means of g values, +inf where there are fewer."""
    return [math.fsum(values[i + 1 - g : i + 1]) / g if i + 1 >= g else math.inf for i in range(len(values))]


def confidence(pieces: Sequence[Sequence[float]], g: int, kind: str) -> float:
    """c of a sample from the log p of its supervised tokens, in pieces that no window leaves."""
    pieces = [[math.exp(x) for x in piece] if kind == "arithmetic" else list(piece) for piece in pieces]
    every = [x for piece in pieces for x in piece]
    if not every:
        return 0.0
    lowest = min(w for piece in pieces for w in [math.inf, *windows(piece, g)])
    if lowest == math.inf:
        lowest = math.fsum(every) / len(every)
    return min(1.0, max(0.0, lowest if kind == "arithmetic" else math.exp(lowest)))


def without_window(pieces: Sequence[Sequence[float]], g: int) -> bool:
    """Whether a sample has supervised tokens, and in no piece enough of them for a window."""
    return 0 < max(map(len, pieces)) < g


@dataclass
class Setting:
    """An objective by its settings."""

    name: str
    reduce: str
    group_size: int = 4
    gamma: float = 1.0
    confidence: str = "geometric"
    options: dict[str, float] = field(default_factory=dict)


def token_weight(name: str, options: Mapping[str, float], logp: float) -> float:
    """w_t of a built-in objective."""
    p = math.exp(logp)
    match name:
        case "sft":
            return 1.0
        case "dft" | "bft":
            return p
        case "power":
            return p ** options["alpha"]
        case "threshold":
            return float(p >= options["q"])
        case "focal":
            g = options["gamma"]
            return (1 - p) ** g - g * p * (1 - p) ** (g - 1) * logp
    raise KeyError(name)


def loss(setting: Setting, logp: Tensor, labels: Tensor, edges: Sequence[int], weight: Tensor, cp: int = 1) -> Tensor:
    """logp [N] float64 with its graph, labels [N], -> the whole rows' sum, not divided; windows within cp's chunks."""
    total, values = logp.sum() * 0, logp.tolist()
    for b, (start, end) in enumerate(pairwise(edges)):
        chunks = [[t for t in chunk if labels[t] != NONE] for chunk in split(range(start, end), cp)]
        tokens = [t for chunk in chunks for t in chunk]
        detached = [[values[t] for t in chunk] for chunk in chunks]
        c = confidence(detached, setting.group_size, setting.confidence)
        s = 1 - c**setting.gamma if setting.name == "bft" else 1.0
        r = 1 / max(len(tokens), 1) if setting.reduce == "samples" else 1.0
        for t in tokens:
            w = token_weight(setting.name, setting.options, values[t])
            total = total - float(weight[b]) * s * r * w * logp[t]
    return total


def random_rows(generator: torch.Generator, lengths: Sequence[int], vocabulary: int) -> Tensor:
    """Labels [N] for samples of these lengths: runs masked at random, unevenly; the third sample has none at all."""
    labels = torch.randint(vocabulary, (sum(lengths),), generator=generator)
    start = 0
    for b, length in enumerate(lengths):
        share = torch.rand((), generator=generator)
        masked = torch.rand(length, generator=generator) < share
        labels[start : start + length][masked | (b == 2)] = NONE
        start += length
    return labels
