"""The counts of tokens from which Megatron would move the experts' bias, with padding left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bft_megatron.upstream.change import Change

COUNTS = Change(
    "megatron.core.transformer.moe.router:TopKRouter._apply_expert_bias",
    "wrapped",
    "It joins the padding mask [tokens] with a map [tokens, experts], which fails unless the two numbers are equal.",
    "a router with a bias takes a padding mask",
    "tests/upstream/test_expert_bias.py",
    ("self", "routing_map", "padding_mask"),
)


def install() -> None:
    """Have routers with a bias take a padding mask."""

    def with_mask(count: Callable[..., None]) -> Callable[..., None]:
        def counting(self: Any, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
            count(self, routing_map, None if padding_mask is None else padding_mask[:, None])

        return counting

    COUNTS.wrap(with_mask)
