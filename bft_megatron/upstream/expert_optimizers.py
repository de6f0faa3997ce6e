"""A resume between layouts in which the experts have an optimizer of their own and layouts in which they have not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bft_megatron.upstream.change import Change

_OPTIMIZER = "megatron.core.optimizer.optimizer"
_UNTIL = "Megatron loads a checkpoint of one optimizer into two, and of two into one"
_TEST = "tests/checkpoint/test_experts.py"

LOAD_STATE_DICT = Change(
    f"{_OPTIMIZER}:ChainedOptimizer.load_state_dict",
    "wrapped",
    "With EP above 1, or ETP other than TP, the experts have an optimizer of their own. Tensors bear the same names in "
    "a checkpoint of one optimizer and of two, but the settings of their parameter groups are elsewhere: a KeyError.",
    _UNTIL,
    _TEST,
    ("self", "state_dict"),
)
GROUP_KEYS = Change(
    f"{_OPTIMIZER}:param_group_identifier_keys",
    "internal",
    "Tells which parameter group of a checkpoint is which of the run's.",
    _UNTIL,
    _TEST,
)

State = dict[Any, Any]


def install() -> None:
    """Have Megatron load the optimizer's state whether or not the experts had an optimizer of their own."""
    LOAD_STATE_DICT.wrap(_loading)


def _loading(load_state_dict: Callable[..., None]) -> Callable[..., None]:
    def load(*args: Any, **kwargs: Any) -> None:
        chain, state = LOAD_STATE_DICT.read(load_state_dict, args, kwargs).values()
        load_state_dict(chain, _as_chained(state, chain.chained_optimizers))

    return load


def _as_chained(state: State, optimizers: list[Any]) -> State:
    """Return a loaded state in the form that this many optimizers load.

    Args:
        state: the settings as they were saved, merged with the tensors where these optimizers asked for them: each at
            the top for one optimizer, under an optimizer's number for several.
    """
    saved = _of_each(state, "optimizer")
    if len(saved) == len(optimizers):
        return state
    groups = {_identity(group): group for part in saved for group in part["optimizer"]["param_groups"]}
    tensors = [state] if len(optimizers) == 1 else [state[i] for i in range(len(optimizers))]
    parts = [
        {**saved[0], "optimizer": {"param_groups": _groups(groups, optimizer)}, "param_state": own["param_state"]}
        for optimizer, own in zip(optimizers, tensors, strict=True)
    ]
    return parts[0] if len(parts) == 1 else dict(enumerate(parts))


def _of_each(state: State, key: str) -> list[State]:
    """Return the part of each optimizer that has the key."""
    return [part for part in (state, *(state[k] for k in sorted(k for k in state if isinstance(k, int)))) if key in part]


def _groups(saved: dict[tuple[Any, ...], State], optimizer: Any) -> list[State]:
    """Return the saved settings of an optimizer's groups, whichever optimizer they were saved of."""
    return [
        {**saved[_identity(group)], "is_expert_parallel": group["is_expert_parallel"]}
        for group in optimizer.optimizer.param_groups
    ]


def _identity(group: State) -> tuple[Any, ...]:
    """Return what tells a group from the others of a run, apart from whose optimizer it is in."""
    keys = getattr(GROUP_KEYS.owner, GROUP_KEYS.name)
    return tuple(group.get(key) for key in keys if key != "is_expert_parallel")
