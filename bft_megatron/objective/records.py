"""The objectives SFT, DFT and BFT, and the lookup of a user's own: each a record with a pure function of a `View`.

    loss = 1/N * sum_b s_b * r_b * sum_{t in b} w_t * -log p_t

An objective gives w_t, s_b and the kind of mean. r_b is 1 for a mean over tokens and 1 / n_b for a mean over samples,
where n_b is the number of a sample's supervised tokens. loss.py multiplies, Megatron divides by N.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bft_megatron.errors import FieldError
from bft_megatron.objective.view import View
from bft_megatron.recipe import environment
from bft_megatron.user_code import blamed, is_missing

FIELD = "objective.name"
Reduce = Literal["tokens", "samples"]
Confidence = Literal["geometric", "arithmetic"]


@dataclass(frozen=True)
class Objective:
    """An objective: the weights of tokens and samples, and the kind of mean.

    name: the name in reports.
    reduce: "tokens": a mean over supervised tokens; "samples": a mean over samples, each the mean over its tokens.
    needs: the quantities that the view must hold beyond log p: {"entropy"}, or empty.
    weights: view -> (w [T], s [B]), floating point; no gradient flows through them.
    """

    name: str
    reduce: Reduce
    needs: frozenset[str]
    weights: Callable[[View], tuple[Tensor, Tensor]]


def _plain(view: View) -> tuple[Tensor, Tensor]:
    return torch.ones_like(view.logp), torch.ones_like(view.weight)


def _dynamic(view: View) -> tuple[Tensor, Tensor]:
    return view.logp.double().exp(), torch.ones_like(view.weight)


def balanced(group_size: int = 256, gamma: float = 1.0, confidence: Confidence = "geometric") -> Objective:
    """Return Balanced Fine-Tuning: w_t = p_t, s_b = 1 - c_b^gamma, a mean over samples (arXiv 2511.21075).

    Args:
        group_size: supervised tokens of a confidence window.
        gamma: exponent of the confidence, above 0.
        confidence: as in `lowest_confidence`.

    Raises:
        FieldError: a setting is out of range; the message names it.
    """
    if fault := environment.GROUP_SIZE.fault(group_size):
        raise FieldError("objective.group_size", fault)
    if fault := environment.GAMMA.fault(gamma):
        raise FieldError("objective.gamma", fault)
    if confidence not in get_args(Confidence):
        raise FieldError("objective.confidence", f"must be one of {get_args(Confidence)}, not {confidence!r}")

    def weights(view: View) -> tuple[Tensor, Tensor]:
        return view.logp.double().exp(), 1 - lowest_confidence(view, group_size, confidence) ** gamma

    return Objective("bft", "samples", frozenset(), weights)


sft = Objective("sft", "tokens", frozenset(), _plain)
dft = Objective("dft", "tokens", frozenset(), _dynamic)
bft = balanced()


def lowest_confidence(view: View, group_size: int, confidence: Confidence) -> Tensor:
    """Return c_b, the model's confidence in the part of each sample where it is lowest, [B] fp64 in [0, 1].

    c_b is the lowest mean of log p over windows of `group_size` consecutive supervised tokens, as a probability
    ("geometric"), or the lowest mean of p ("arithmetic"). A sample shorter than a window takes the mean over all its
    tokens, a sample without tokens 0.

    Collectives over context parallelism: those of `View.windows`, `View.min` and `View.mean`, whatever the data; none
    in a second call for the same view: the step reports the confidences that the objective has just weighed with.
    """
    return view.once(("confidence", group_size, confidence), lambda: _lowest_confidence(view, group_size, confidence))


def without_window(view: View, group_size: int, confidence: Confidence) -> Tensor:
    """Return which samples have tokens and no window, so that c_b is the mean over all their tokens, [B] bool.

    Collectives over context parallelism: none after `lowest_confidence` of the same view, else its `View.min` and
    `View.windows`.
    """
    return _lowest_window(view, group_size, confidence).isposinf() & (view.n > 0)


def _lowest_window(view: View, group_size: int, confidence: Confidence) -> Tensor:
    """Return the lowest mean over a sample's windows, [B] fp64; +inf without a window."""
    key = ("lowest window", group_size, confidence)
    return view.once(key, lambda: view.min(view.windows(_averaged(view, confidence), group_size)))


def _averaged(view: View, confidence: Confidence) -> Tensor:
    return view.logp if confidence == "geometric" else view.logp.double().exp()


def _lowest_confidence(view: View, group_size: int, confidence: Confidence) -> Tensor:
    lowest, mean = _lowest_window(view, group_size, confidence), view.mean(_averaged(view, confidence))
    c = torch.where(lowest.isposinf(), mean, lowest)
    c = c.exp() if confidence == "geometric" else c
    return torch.where(view.n > 0, c.clamp(0, 1), 0.0)


def lookup(
    name: str,
    *,
    group_size: int,
    gamma: float,
    confidence: Confidence,
    reduce: Reduce | None = None,
) -> Objective:
    """Return the objective that a recipe names.

    Args:
        name: "sft", "dft", "bft", or "package.module:attribute", which is an `Objective` or a function that returns
            one. The function gets those of `group_size`, `gamma` and `confidence` that its signature names.
        reduce: replaces the objective's own where given.

    Raises:
        FieldError: there is no such objective; the message says what was tried.
    """
    settings: dict[str, Any] = {"group_size": group_size, "gamma": gamma, "confidence": confidence}
    builtin: dict[str, Objective] = {"sft": sft, "dft": dft}
    if name == "bft":
        found = balanced(**settings)
    else:
        found = builtin[name] if name in builtin else _users(name, settings)
    return found if reduce is None else replace(found, reduce=reduce)


def _users(name: str, settings: dict[str, Any]) -> Objective:
    """Return the user's objective; what goes wrong in the user's code, then and in its weights, is a FieldError."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise FieldError(FIELD, f"{name!r} is none of sft, dft, bft and has not the form package.module:attribute")
    with blamed(FIELD, module):
        found = _import(name, module, attribute)
        if not isinstance(found, Objective) and callable(found):
            wanted = inspect.signature(found).parameters
            found = found(**{key: value for key, value in settings.items() if key in wanted})
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
