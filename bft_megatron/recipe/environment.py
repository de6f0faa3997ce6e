"""The two defaults of Balanced Fine-Tuning that the environment may set: BFT_GROUP_SIZE and BFT_CONF_GAMMA.

They are read only when a default is needed, so that a recipe or a keyword argument overrides them. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from bft_megatron.errors import UserError


def group_size() -> int:
    """Return BFT_GROUP_SIZE, the number of supervised tokens in a confidence window; 256 if it is not set.

    Raises:
        UserError: the variable is not a positive integer.
    """
    return _read("BFT_GROUP_SIZE", 256, int)


def gamma() -> float:
    """Return BFT_CONF_GAMMA, the exponent of the confidence; 1.0 if it is not set.

    Raises:
        UserError: the variable is not a positive finite number.
    """
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
