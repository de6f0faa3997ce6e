"""The objectives SFT, DFT and BFT, each a record with a pure function of a `View`; family.py has others.

    loss = 1/N * sum_b s_b * r_b * sum_{t in b} w_t * -log p_t

An objective gives w_t, s_b and the kind of mean. r_b is 1 for a mean over tokens and 1 / n_b for a mean over samples,
where n_b is the number of a sample's supervised tokens. loss.py multiplies, Megatron divides by N.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from bft_megatron.errors import FieldError
from bft_megatron.objective.view import View
from bft_megatron.recipe import environment

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
