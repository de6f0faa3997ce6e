"""Reading the values of a row's fields: text, JSON, numbers; every error names the place."""

from __future__ import annotations

import json
import math
from typing import Any

from bft_megatron.errors import UserError
from bft_megatron.recipe.limits import Range

WEIGHT = Range(at_least=0, at_most=1_000_000)
"""The largest weight of a row. The sums over a batch stay far within the range of fp32."""


def parsed(value: Any, kind: type, where: str) -> Any:
    """Return a list or an object that a cell holds, parsed if it is JSON text as in tables; None if it is empty."""
    name = "list" if kind is list else "object"
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UserError(f"must be a JSON {name}, not {shown(value)}", where) from None
    if not isinstance(value, kind):
        raise UserError(f"must be a JSON {name}, not {shown(value)}", where)
    return value


def text(value: Any, where: str, *, answer: bool = False) -> str:
    """Return text that can be written as UTF-8; with `answer`, it may not be blank. Raises UserError."""
    if not isinstance(value, str):
        raise UserError(f"must be text, not {shown(value)}", where)
    if answer and not value.strip():
        raise UserError("an assistant's message must not be empty", where)
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"half a surrogate pair at character {e.start + 1}", where) from None
    return value


def weight(value: Any, where: str) -> float:
    """Return the number that a row's weight is, 1 if it has none. Raises UserError."""
    if value is None:
        return 1.0
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):  # every CSV cell is text
            raise ValueError
        number = float(value)
    except ValueError:
        raise UserError(f"must be a number, not {shown(value)}", where) from None
    except OverflowError:
        number = math.inf
    if fault := WEIGHT.fault(number):
        raise UserError(fault, where)
    return number


def shown(value: Any) -> str:
    """Return the beginning of a value as JSON, for an error."""
    return json.dumps(value, default=str)[:40]
