"""The hooks that wait for parameters with `overlap-param-gather`, which are off during a validation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from bft_megatron.upstream.change import Change

_MODULE = "megatron.training.training"
_VALIDATING = "With `overlap-param-gather` a validation must run without the hooks that wait for parameters."
_WHY = (
    f"{_VALIDATING} Megatron turns them on after the first step that is not skipped, and fails with a KeyError in a "
    "validation before that, where it turns off what is not on. The wrappers leave out the chunks that are as asked."
)
_UNTIL = "Megatron validates while the first steps are skipped"
_TEST = "tests/checkpoint/test_blow_up.py"

HAS = Change(
    f"{_MODULE}:should_disable_forward_pre_hook",
    "internal",
    _VALIDATING,
    "Megatron validates before the first step",
    "tests/layouts/test_heads.py",
    ("args",),
)
DISABLE = Change(
    f"{_MODULE}:disable_forward_pre_hook",
    "wrapped",
    _WHY,
    _UNTIL,
    _TEST,
    ("model_chunks", "optimizer", "param_sync"),
)
ENABLE = Change(f"{_MODULE}:enable_forward_pre_hook", "wrapped", _WHY, _UNTIL, _TEST, ("model_chunks",))


def mend() -> None:
    """Make turning the hooks off or on a second time do nothing."""
    DISABLE.wrap(lambda disable: _of_chunks(disable, on=True))
    ENABLE.wrap(lambda enable: _of_chunks(enable, on=False))


def _of_chunks(function: Callable[..., None], *, on: bool) -> Callable[..., None]:
    """Return the function called with those chunks alone whose hooks are on, or off."""

    def called(model_chunks: list[Any], *args: Any, **kwargs: Any) -> None:
        chosen = [chunk for chunk in model_chunks if bool(chunk.remove_forward_pre_hook_handles) == on]
        function(chosen, *args, **kwargs)

    return called


@contextlib.contextmanager
def off(model: list[Any], optimizer: Any, *, param_sync: bool) -> Iterator[None]:
    """Turn the hooks off, where the run has them, and on again.

    Args:
        model: this rank's chunks.
        optimizer: Megatron's.
        param_sync: gather the parameters first that the last step updated on other ranks.
    """
    from megatron.training import training

    if not training.should_disable_forward_pre_hook(training.get_args()):
        yield
        return
    training.disable_forward_pre_hook(model, optimizer=optimizer, param_sync=param_sync)
    yield
    training.enable_forward_pre_hook(model)
