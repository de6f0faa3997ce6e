"""Megatron's compiled data set helper, used as the wheel ships it."""

from __future__ import annotations

from bft_megatron.upstream.change import Change

COMPILE_HELPERS = Change(
    "megatron.core.datasets.utils:compile_helpers",
    "replaced",
    "Megatron compiles the helper at every start and ends the run if that fails. The wheel ships the compiled helper "
    "without the Makefile.",
    "the wheel has the Makefile, or Megatron does not compile a compiled helper again",
    "tests/upstream/test_small_changes.py",
    (),
)


def without_compiling() -> None:
    """Keep Megatron from compiling the helper at its start."""
    COMPILE_HELPERS.put(lambda: None)
