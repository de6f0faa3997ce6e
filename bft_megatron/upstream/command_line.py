"""Megatron's arguments, parsed from a list of flags."""

from __future__ import annotations

import sys
from typing import Any

from bft_megatron.upstream.change import Change

PARSE = Change(
    "megatron.training.arguments:parse_and_validate_args",
    "internal",
    "It makes the global arguments, which nearly all code below `pretrain` reads whatever configuration object it is "
    "given. It reads `sys.argv`, which is set for the call.",
    "it takes a list, or the loop takes its configuration objects alone",
    "tests/upstream/test_small_changes.py",
    (),
)


def parse(flags: list[str]) -> Any:
    """Parse and validate flags; return Megatron's arguments, which also become its global ones."""
    from megatron.training.arguments import parse_and_validate_args

    before, sys.argv = sys.argv, ["bft-megatron", *flags]
    try:
        return parse_and_validate_args()
    finally:
        sys.argv = before
