"""Whom Megatron's loop asks after every step whether to save and stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bft_megatron.upstream.change import Change

_WHY = (
    "Megatron's handler answers one signal, by an all-gather of one number and as many device reads as there are "
    "ranks. Ours answers SIGUSR1, SIGTERM, SIGINT and the time limit by one MAX all-reduce."
)
_UNTIL = "Megatron's handler answers several signals by one reduction"
_TEST = "tests/upstream/test_training_loop.py"

SET_HANDLER = Change(
    "megatron.training.global_vars:_set_signal_handler", "replaced", _WHY, _UNTIL, _TEST, ("exit_signal",)
)
HANDLER = Change("megatron.training.global_vars:_GLOBAL_SIGNAL_HANDLER", "replaced", _WHY, _UNTIL, _TEST)


class _Handler:
    """As much of Megatron's `DistributedSignalHandler` as its loop uses."""

    def __init__(self, stops: Callable[[], bool]) -> None:
        self._stops = stops

    def signals_received(self) -> list[bool]:
        return [self._stops()]


def ask(stops: Callable[[], bool]) -> None:
    """Have Megatron's loop call `stops()` after every step, on every rank; True saves and ends the loop.

    To be called before Megatron's arguments are parsed with `--exit-signal-handler`, when Megatron would take the
    signal for itself.
    """

    def use_ours(exit_signal: Any) -> None:
        HANDLER.put(_Handler(stops))

    SET_HANDLER.put(use_ours)
