"""Megatron's compiled data set helper, used as its wheel ships it."""

from __future__ import annotations

from bft_megatron.upstream.change import Change

COMPILE_HELPERS = Change(
    "megatron.core.datasets.utils:compile_helpers",
    "replaced",
    "The wheel ships the compiled helper without the Makefile to compile it again; Megatron would end the run.",
    "the wheel has the Makefile, or a compiled helper is not compiled again",
    "tests/upstream/test_small_changes.py",
    (),
)


def without_compiling() -> None:
    """Keep Megatron from compiling the helper when it starts."""
    COMPILE_HELPERS.put(lambda: None)
