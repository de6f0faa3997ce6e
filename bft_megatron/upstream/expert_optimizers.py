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
        state: what was saved of each optimizer, merged with the tensors that these optimizers asked for: at the top
            for one optimizer, under each one's number for several. A stage without experts asks for none of theirs.
    """
    saved = _parts(state)
    settings = _settings([group for part in saved for group in part["optimizer"]["param_groups"]])
    tensors = [state] if len(optimizers) == 1 else [state.get(i, {}) for i in range(len(optimizers))]
    parts = [
        {**saved[0], **own, "optimizer": {"param_groups": list(map(settings, optimizer.optimizer.param_groups))}}
        for optimizer, own in zip(optimizers, tensors, strict=True)
    ]
    return parts[0] if len(parts) == 1 else dict(enumerate(parts))


def _parts(state: State) -> list[State]:
    """Return what was saved of each optimizer."""
    if "optimizer" in state:
        return [state]
    return [state[i] for i in sorted(key for key in state if isinstance(key, int))]


def _settings(saved: list[State]) -> Callable[[State], State]:
    """Return a function from a parameter group of the run to its settings among those that were saved.

    Adam has counted no step for a group without parameters, such as the experts' on a pipeline stage without any.
    """
    by_identity = {_identity(group): group for group in saved}
    steps = max(group.get("step", 0) for group in saved)

    def of(group: State) -> State:
        return {**by_identity[_identity(group)], "is_expert_parallel": group["is_expert_parallel"], "step": steps}

    return of


def _identity(group: State) -> tuple[Any, ...]:
    """Return what tells a group from the others of a run, apart from whose optimizer it is in."""
    keys = getattr(GROUP_KEYS.owner, GROUP_KEYS.name)
    return tuple(group.get(key) for key in keys if key != "is_expert_parallel")
