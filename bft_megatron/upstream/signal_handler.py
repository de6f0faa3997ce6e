"""The handler that Megatron's loop asks after every step whether to save and stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bft_megatron.upstream.change import Change

_WHY = (
    "Megatron's handler handles one signal, with an all-gather of one number and one device read for each rank. Ours "
    "handles SIGUSR1, SIGTERM, SIGINT, SIGHUP and the time limit with one MAX all-reduce."
)
_UNTIL = "Megatron's handler handles several signals with one reduction"
_TEST = "tests/upstream/test_training_loop.py"

SET_HANDLER = Change(
    "megatron.training.global_vars:_set_signal_handler", "replaced", _WHY, _UNTIL, _TEST, ("exit_signal",)
)
HANDLER = Change("megatron.training.global_vars:_GLOBAL_SIGNAL_HANDLER", "replaced", _WHY, _UNTIL, _TEST)


class _Handler:
    """The part of Megatron's `DistributedSignalHandler` that its loop uses."""

    def __init__(self, stops: Callable[[], bool]) -> None:
        self._stops = stops

    def signals_received(self) -> list[bool]:
        return [self._stops()]


def ask(stops: Callable[[], bool]) -> None:
    """Have Megatron's loop call `stops()` after every step, on every rank; True saves and ends the loop.

    Must be called before Megatron's arguments are parsed with `--exit-signal-handler`, as Megatron then installs its
    own handler.
    """

    def use_ours(exit_signal: Any) -> None:
        HANDLER.put(_Handler(stops))

    SET_HANDLER.put(use_ours)
