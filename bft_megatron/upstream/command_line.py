"""Megatron's arguments from a list of flags."""

from __future__ import annotations

import sys
from typing import Any

from bft_megatron.upstream.change import Change

PARSE = Change(
    "megatron.training.arguments:parse_and_validate_args",
    "internal",
    "It reads `sys.argv`, which is set for the call: nearly everything below `pretrain` asks for the global arguments "
    "that it makes, whatever configuration object it is given.",
    "it takes a list, or the loop takes its configuration objects alone",
    "tests/upstream/test_small_changes.py",
    (),
)


def parse(flags: list[str]) -> Any:
    """Megatron's parsed and validated arguments, which also become its global ones."""
    from megatron.training.arguments import parse_and_validate_args

    before, sys.argv = sys.argv, ["bft-megatron", *flags]
    try:
        return parse_and_validate_args()
    finally:
        sys.argv = before
