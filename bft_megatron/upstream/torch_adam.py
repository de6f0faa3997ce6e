"""Fixes for saving and resuming Megatron's distributed optimizer with torch's Adam.

Megatron supports a resume with apex's or Transformer Engine's fused Adam, which keep one step count for each parameter
group. torch's Adam, used without a GPU, keeps one tensor for each parameter, and five places of
`core/optimizer/distrib_optimizer.py` fail with it. Each declaration says what fails without the change. No update is
changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bft_megatron.upstream.change import Change

_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
_UNTIL = "Megatron resumes with torch's Adam"
_TEST = "tests/upstream/test_checkpoints.py"

STATE_DICT = Change(
    f"{_OPTIMIZER}.state_dict",
    "wrapped",
    "Adam has no state before its first step, and never any for the experts of a pipeline stage without experts. "
    "Megatron asserts exactly one step count at every save and load.",
    _UNTIL,
    _TEST,
    ("self",),
)
LOAD_STATE_DICT = Change(
    f"{_OPTIMIZER}.load_state_dict",
    "wrapped",
    "Loading writes into leaves that require grad. It leaves one step count shared by all parameters, which Adam would "
    "advance once for each parameter, and in the `dp_reshardable` format it restores the old count: the first loss "
    "after a resume is correct, the second is not.",
    _UNTIL,
    _TEST,
    ("self", "state_dict"),
)
SET_STATES = Change(
    f"{_OPTIMIZER}._set_main_param_and_optimizer_states",
    "wrapped",
    'The fully reshardable format has no "step": a KeyError.',
    _UNTIL,
    _TEST,
    ("self", "model_param", "tensors"),
)


def in_use() -> bool:
    """Return whether Megatron uses torch's Adam, as neither apex nor Transformer Engine is installed."""
    from megatron.core import optimizer

    return optimizer.Adam is torch.optim.AdamW


def install() -> None:
    """Wrap three methods of `DistributedOptimizer`. Must be called only once."""
    STATE_DICT.wrap(_with_state)
    LOAD_STATE_DICT.wrap(_with_own_steps)
    SET_STATES.wrap(_but_step)


def _with_state(state_dict: Callable[..., Any]) -> Callable[..., Any]:
    def fill_and_give(self: Any) -> dict[str, Any]:
        if not any(group["params"] for group in self.optimizer.param_groups):
            return _without_parameters(self.optimizer)
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if not self.optimizer.state[p]:
                    zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                    self.optimizer.state[p] = {"step": torch.tensor(0.0), **zeros}
        return state_dict(self)

    return fill_and_give


def _without_parameters(adam: torch.optim.Optimizer) -> dict[str, Any]:
    groups = [{k: v for k, v in group.items() if k != "params"} for group in adam.param_groups]
    return {"optimizer": {"param_groups": [{**group, "step": 0.0} for group in groups]}}


def _with_own_steps(load_state_dict: Callable[..., None]) -> Callable[..., None]:
    @torch.no_grad()  # fp32 main parameters are views of the model's parameters
    def load_and_part(self: Any, state_dict: dict[str, Any]) -> None:
        step = float(state_dict["optimizer"]["param_groups"][0]["step"])
        load_state_dict(self, state_dict)
        for own in self.optimizer.state.values():
            own["step"] = torch.tensor(step)

    return load_and_part


def _but_step(set_states: Callable[..., None]) -> Callable[..., None]:
    def set_all_but_step(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        # Only tensors are copied, so None keeps the count that `load_state_dict` gave.
        set_states(self, model_param, {**tensors, "step": None})

    return set_all_but_step
