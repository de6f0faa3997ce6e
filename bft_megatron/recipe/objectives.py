"""The objectives that a recipe names without code of the user's, and the ranges of their options. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from bft_megatron.errors import FieldError, shortened
from bft_megatron.recipe.limits import Range

OPTIONS: dict[str, dict[str, Range]] = {
    "sft": {},
    "dft": {},
    "bft": {},
    "power": {"alpha": Range(above=0)},
    "threshold": {"q": Range(at_least=0, below=1)},
    "focal": {"gamma": Range(at_least=0)},
}
"""By name: the numbers that `objective.options` must give, each with its range. Settings of `bft` are fields."""


def check(name: str, options: Mapping[str, Any]) -> None:
    """Raise FieldError if the options are not those of an objective of `OPTIONS`."""
    ranges = OPTIONS[name]
    for option, value in options.items():
        if option not in ranges:
            raise FieldError(f"objective.options.{option}", unknown(name, ranges))
        if type(value) not in (int, float):
            raise FieldError(f"objective.options.{option}", f"must be a number, not {shortened(value)}")
        if fault := ranges[option].fault(value):
            raise FieldError(f"objective.options.{option}", fault)
    if missing := [option for option in ranges if option not in options]:
        raise FieldError("objective.options", f"{name} needs {', '.join(missing)}")


def unknown(name: str, options: Collection[str]) -> str:
    """Return the sentence about an option that an objective does not have."""
    return f"{name} has no such option; it has {', '.join(options) or 'none'}"


def no_such(name: str) -> str:
    """Return the sentence about the name of no objective."""
    return f"{name!r} is none of {', '.join(OPTIONS)}, and no package.module:attribute"
