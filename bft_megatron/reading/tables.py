"""Leaving out the nulls that a table adds: a row has every field that any row has, and null in those it lacks."""

from __future__ import annotations

from typing import Any

NULLS_DROPPED = (
    "the table holds tool arguments or schemas as structs, whose nulls may be its own: they are left out; store them "
    "as JSON text to keep those that are meant"
)
"""Note on a row that lost a null which may have been its own."""

_FREE = {"arguments", "parameters", "properties"}
"""Fields with a user's own names below them, where a null may be meant."""


def without_nulls(row: Any) -> tuple[Any, bool]:
    """Return a table's row without nulls inside its columns, and whether one of them may be the data's own."""
    doubtful = False

    def bare(value: Any, free: bool) -> Any:
        nonlocal doubtful
        if isinstance(value, list):
            return [bare(item, free) for item in value]
        if not isinstance(value, dict):
            return value
        doubtful |= free and None in value.values()
        return {name: bare(item, free or name in _FREE) for name, item in value.items() if item is not None}

    return {name: bare(value, name in _FREE) for name, value in row.items()}, doubtful
