"""Routers that take the experts they are told, and tell which they would choose."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class Replay:
    """A router's `router_replay`, which Megatron's routers ask for a token's experts where they have one.

    Args:
        choose: the experts to take, [n, k], given those that the router chooses.
    """

    def __init__(self, choose: Callable[[Tensor], Tensor]) -> None:
        self._choose = choose

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Return the scores of the experts to take, and these, [n, k] both."""
        _, own = default_compute_topk(scores, topk, num_groups, group_topk)
        experts = self._choose(own)
        return scores.gather(1, experts), experts
