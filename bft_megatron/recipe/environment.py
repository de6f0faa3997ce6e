"""The two defaults of Balanced Fine-Tuning that the environment may set: BFT_GROUP_SIZE and BFT_CONF_GAMMA.

Read when asked for, so that a recipe or a keyword argument wins over them. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from bft_megatron.errors import UserError


def group_size() -> int:
    """BFT_GROUP_SIZE, the supervised tokens of a confidence window, or 256. UserError unless a positive integer."""
    return _read("BFT_GROUP_SIZE", 256, int)


def gamma() -> float:
    """BFT_CONF_GAMMA, the exponent of the confidence, or 1.0. UserError unless positive and finite."""
    return _read("BFT_CONF_GAMMA", 1.0, float)


def _read[Number: (int, float)](variable: str, default: Number, parse: Callable[[str], Number]) -> Number:
    text = os.environ.get(variable, "").strip()
    if not text:
        return default
    try:
        value = parse(text)
    except ValueError:
        value = parse("0")
    if not 0 < value < float("inf"):
        kind = "integer" if parse is int else "number"
        raise UserError(f"must be a positive {kind}, not {text!r}", where=f"environment variable {variable}")
    return value
