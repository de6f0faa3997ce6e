"""The lookup of the objective that a recipe names: a built-in one, or a record of a user's own module."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import Tensor

from bft_megatron.errors import FieldError, shortened
from bft_megatron.objective import family
from bft_megatron.objective.records import Confidence, Objective, Reduce, balanced, dft, sft
from bft_megatron.objective.view import View
from bft_megatron.recipe import objectives
from bft_megatron.user_code import blamed, is_missing

FIELD, OPTIONS = "objective.name", "objective.options"
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
BUILT_IN: dict[str, Objective | Callable[..., Objective]] = {
    "sft": sft,
    "dft": dft,
    "bft": balanced,
    "power": family.power,
    "threshold": family.threshold,
    "focal": family.focal,
}
"""By the name in a recipe: a record, or the function that returns it."""


def lookup(
    name: str,
    *,
    group_size: int,
    gamma: float,
    confidence: Confidence,
    reduce: Reduce | None = None,
    options: Mapping[str, Any] | None = None,
) -> Objective:
    """Return the objective that a recipe names.

    Args:
        name: one of `BUILT_IN`, or "package.module:attribute", which is an `Objective` or a function that returns one.
            The function gets those of `group_size`, `gamma` and `confidence` that its signature names.
        reduce: replaces the objective's own where given.
        options: further arguments of the function, by name; they come before the three.

    Raises:
        FieldError: there is no such objective, or it has no such option; the message says what was tried.
    """
    settings: dict[str, Any] = {"group_size": group_size, "gamma": gamma, "confidence": confidence}
    options = options or {}
    if name in BUILT_IN:
        objectives.check(name, options)
        found: Objective = _made(name, BUILT_IN[name], settings, options)
    else:
        found = _users(name, settings, options)
    return found if reduce is None else replace(found, reduce=reduce)


def _made(name: str, found: Any, settings: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Return a record as it is, or what a function makes of the options and the settings that its signature names."""
    is_made = callable(found) and not isinstance(found, Objective)
    wanted = inspect.signature(found).parameters if is_made else {}
    for option, value in options.items():
        if option not in wanted:
            own = [key for key in wanted if key not in settings]
            raise FieldError(f"{OPTIONS}.{option}", objectives.unknown(name, own))
        if fault := _type_fault(value, get_type_hints(found).get(option)):
            raise FieldError(f"{OPTIONS}.{option}", fault)
    given = {key: value for key, value in {**settings, **options}.items() if key in wanted}
    for key, parameter in wanted.items():
        if parameter.default is parameter.empty and parameter.kind in NAMED and key not in given:
            raise FieldError(OPTIONS, f"{name} needs {key}")
    return found(**given) if is_made else found


def _type_fault(value: Any, kind: Any) -> str | None:
    """Return what an option must be by its annotation and isn't, or None."""
    if get_origin(kind) is Literal:
        return None if value in get_args(kind) else f"must be one of {get_args(kind)}, not {shortened(value)}"
    if kind is float and type(value) in (int, float):
        return None if math.isfinite(value) else f"must be finite, not {value}"
    if kind in (bool, int, float, str) and type(value) is not kind:
        return f"must be of the type {kind.__name__}, not {shortened(value)}"
    return None


def _users(name: str, settings: Mapping[str, Any], options: Mapping[str, Any]) -> Objective:
    """Return the user's objective; what goes wrong in the user's code, then and in its weights, is a FieldError."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise FieldError(FIELD, objectives.no_such(name))
    with blamed(FIELD, module):
        found = _made(name, _import(name, module, attribute), settings, options)
    if not isinstance(found, Objective):
        raise FieldError(FIELD, f"{name!r} is neither an Objective nor a function that returns one: {found!r}")
    if fault := _fault(found):
        raise FieldError(FIELD, f"the objective of {name!r} has {fault}")

    def weights(view: View) -> tuple[Tensor, Tensor]:
        with blamed(FIELD, module):
            return found.weights(view)

    return replace(found, weights=functools.wraps(found.weights)(weights))


def _import(name: str, module: str, attribute: str) -> Any:
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not is_missing(module, error):
            raise
        raise FieldError(FIELD, f"tried to import {module!r} for {name!r}: {error}") from error
    try:
        return getattr(imported, attribute)
    except AttributeError as error:
        raise FieldError(FIELD, f"imported {module!r}, which has no {attribute!r}") from error


def _fault(record: Any) -> str | None:
    """Return what is wrong with a record that a user made, or None."""
    if record.reduce not in get_args(Reduce):
        return f"reduce {record.reduce!r}, which is none of {get_args(Reduce)}"
    if not isinstance(record.needs, frozenset | set):
        return f"needs {record.needs!r}, which is no set of names"
    return None if callable(record.weights) else f"weights {record.weights!r}, which is no function"
