"""The experts that transformers' routers choose: recorded, and those of one run forced into another.

Rounding sends a token whose experts' scores are close to another expert, and its output is another one then. Two runs
are comparable where the choice is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Routing(TorchFunctionMode):
    """A context in which a model's routers are heard, whatever their class: each calls `torch.topk` on its scores.

    Args:
        experts: number of experts of a layer, by which a router's call is known; 0: there is none.
        forced: the experts to take by layer, [n, k] each, in place of the routers' own choice.
    """

    def __init__(self, experts: int, forced: list[Tensor] | None = None) -> None:
        super().__init__()
        self.experts, self.forced = experts, forced
        self.chosen: list[Tensor] = []
        """The routers' own choice by layer, [n, k] each."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, and put the forced experts in place of a router's."""
        found = func(*args, **(kwargs or {}))
        if func is not torch.topk or args[0].shape[-1] != self.experts:
            return found
        self.chosen.append(found[1])
        if self.forced is None:
            return found
        experts = self.forced[len(self.chosen) - 1]
        return args[0].gather(-1, experts), experts


def differing(chosen: Tensor, others: Tensor) -> Tensor:
    """Return which tokens are sent to other experts, [n] bool, by two choices [n, k] in any order."""
    return (chosen.sort(-1).values != others.sort(-1).values).any(-1)
