"""The number of tokens that each expert receives in a step, and the experts that receive none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from bft_megatron.processes.device import current_device

DEAD_AFTER = 1000
"""Tokens that an expert's layer has sent to each expert on average, while it received none itself, when it is dead."""


class ExpertLoad:
    """The tokens of the running step by layer and expert; `reduce` adds those of all ranks.

    Args:
        layers: numbers of the layers that have experts, from 0.
        experts: experts of a layer.
    """

    def __init__(self, layers: Sequence[int], experts: int) -> None:
        self.layers, self.experts = list(layers), experts
        self.by_layer: dict[int, float] = {}
        """Layer -> the largest load of an expert over the mean, after `reduce`."""
        self._counts: Tensor | None = None
        self._missed = torch.zeros(len(self.layers), experts, dtype=torch.float64)
        """Mean load of an expert's layer since the expert's last token."""

    def add(self, layer: int, counts: Tensor) -> None:
        """Add a micro-batch's tokens, [experts] int64, of one layer. Does not wait for the device."""
        if self._counts is None:
            self._counts = self._empty()
        self._counts[self.layers.index(layer)] += counts

    def reduce(self) -> None:
        """Reduce the step's tokens over all ranks and start again from zero.

        One SUM all-reduce [layers, experts] int64 over all ranks: pipeline ranks hold different layers, the others
        different tokens.
        """
        counts = self._empty() if self._counts is None else self._counts
        dist.all_reduce(counts)
        self._counts = None
        self._take(counts)

    def _take(self, counts: Tensor) -> None:
        """Read the reduced tokens; waits for the device."""
        loads = counts.cpu().double()
        mean = loads.mean(1, keepdim=True)
        worst = loads.amax(1) / mean[:, 0].clamp(min=1 / self.experts)
        self.by_layer = dict(zip(self.layers, worst.tolist(), strict=True))
        named = self._missed.isneginf()
        self._missed = torch.where((loads > 0) & ~named, 0.0, self._missed + mean)

    def report(self) -> dict[str, float | int]:
        """Return the largest load over the mean of the layer where it is largest, and that layer."""
        layer = max(self.by_layer, key=self.by_layer.__getitem__)
        return {"expert_load": self.by_layer[layer], "expert_load_layer": layer}

    def newly_dead(self) -> dict[int, list[int]]:
        """Return layer -> experts that are dead; each expert only once."""
        found = defaultdict(list)
        for i, expert in torch.nonzero(self._missed >= DEAD_AFTER).tolist():
            found[self.layers[i]].append(expert)
            self._missed[i, expert] = -torch.inf
        return dict(found)

    def _empty(self) -> Tensor:
        return torch.zeros(len(self.layers), self.experts, dtype=torch.int64, device=current_device())


def dead_experts(dead: dict[int, list[int]]) -> str:
    """Return the sentence that names dead experts."""
    named = "; ".join(f"layer {layer}: {', '.join(map(str, experts))}" for layer, experts in dead.items())
    return f"experts that received no token of the last {DEAD_AFTER:,} and more on average of their layer: {named}"
