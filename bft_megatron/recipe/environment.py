"""The two defaults of Balanced Fine-Tuning that the environment may set: BFT_GROUP_SIZE and BFT_CONF_GAMMA.

They are read only when a default is needed, so that a recipe or a keyword argument overrides them. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from bft_megatron.errors import UserError, shortened
from bft_megatron.recipe.limits import INT32, Range

GROUP_SIZE = Range(at_least=1, at_most=INT32)
GAMMA = Range(above=0)


def group_size() -> int:
    """Return BFT_GROUP_SIZE, the number of supervised tokens in a confidence window; 256 if it is not set.

    Raises:
        UserError: the variable is not a whole number in the range of `objective.group_size`.
    """
    return _read("BFT_GROUP_SIZE", 256, int, GROUP_SIZE)


def gamma() -> float:
    """Return BFT_CONF_GAMMA, the exponent of the confidence; 1.0 if it is not set.

    Raises:
        UserError: the variable is not a number in the range of `objective.gamma`.
    """
    return _read("BFT_CONF_GAMMA", 1.0, float, GAMMA)


def _read[Number: (int, float)](variable: str, default: Number, parse: Callable[[str], Number], limit: Range) -> Number:
    text, where = os.environ.get(variable, "").strip(), f"environment variable {variable}"
    if not text:
        return default
    try:
        value = parse(text)
    except ValueError:
        kind = "whole number" if parse is int else "number"
        raise UserError(f"must be a {kind}, not {shortened(text)!r}", where) from None
    if fault := limit.fault(value, repr(shortened(text))):
        raise UserError(fault, where)
    return value
