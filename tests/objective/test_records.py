"""The objectives' weights and confidences against plain loops, and looking an objective up by its name."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bft_megatron.errors import UserError
from bft_megatron.objective import records
from bft_megatron.objective.lookup import lookup
from bft_megatron.objective.records import Objective, lowest_confidence
from bft_megatron.objective.view import Geometry, View
from tests.helpers import objective_reference as reference

SETTINGS = {"group_size": 3, "gamma": 2.0, "confidence": "arithmetic"}


def _view(samples: list[list[float]]) -> View:
    """A packed row of samples given by the log p of their tokens, all supervised."""
    lengths = torch.tensor([len(s) for s in samples])
    edges = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    labels = torch.zeros(int(lengths.sum()), dtype=torch.int64)
    geometry = Geometry(labels, edges, torch.ones(len(samples), dtype=torch.bool), torch.ones(len(samples)))
    return geometry.view(torch.tensor([x for s in samples for x in s], dtype=torch.float32))


log_probabilities = st.lists(st.lists(st.floats(-30, 0, width=32), max_size=9), min_size=1, max_size=5)


@given(log_probabilities, st.integers(1, 5), st.sampled_from(["geometric", "arithmetic"]))
@settings(max_examples=60, deadline=None)
def test_confidence_and_weights(samples: list[list[float]], group_size: int, confidence: str):
    view = _view(samples)
    expected = torch.tensor([reference.confidence([s], group_size, confidence) for s in samples], dtype=torch.float64)
    found = lowest_confidence(view, group_size, confidence)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    token, sample = records.balanced(group_size, 0.5, confidence).weights(view)
    p = torch.tensor([math.exp(x) for s in samples for x in s], dtype=torch.float64)
    torch.testing.assert_close(token, p, rtol=1e-12, atol=0)
    torch.testing.assert_close(sample, 1 - found.sqrt(), rtol=1e-12, atol=0)  # the root of a tiny c magnifies its error


def test_confidence_by_hand():
    half, quarter = math.log(0.5), math.log(0.25)
    view = _view([[half, quarter, half], [quarter], [], [0.0, 0.0]])
    assert lowest_confidence(view, 2, "geometric").tolist() == pytest.approx([0.125**0.5, 0.25, 0.0, 1.0], rel=1e-7)
    assert lowest_confidence(view, 2, "arithmetic").tolist() == pytest.approx([0.375, 0.25, 0.0, 1.0], rel=1e-7)


def test_the_same_views_confidence_is_computed_once():
    view = _view([[-1.0, -2.0]])
    assert lowest_confidence(view, 2, "geometric") is lowest_confidence(view, 2, "geometric")
    assert lowest_confidence(view, 1, "geometric").item() != lowest_confidence(view, 2, "geometric").item()


def test_plain_and_dynamic_weights():
    view = _view([[-1.0, -2.0], [-0.5]])
    for objective, expected in ((records.sft, torch.ones(3)), (records.dft, torch.tensor([-1.0, -2.0, -0.5]).exp())):
        token, sample = objective.weights(view)
        torch.testing.assert_close(token.float(), expected)
        assert sample.tolist() == [1.0, 1.0]


def test_the_table():
    table = {o.name: (o.reduce, o.needs) for o in (records.sft, records.dft, records.bft)}
    nothing = frozenset()
    assert table == {"sft": ("tokens", nothing), "dft": ("tokens", nothing), "bft": ("samples", nothing)}


def _first_token(view: View) -> tuple[Tensor, Tensor]:
    return torch.ones_like(view.logp), torch.zeros_like(view.weight)


mine = Objective("mine", "samples", frozenset({"entropy"}), _first_token)


def scaled(gamma: float) -> Objective:
    """A factory that names one of the settings."""
    return Objective(f"scaled {gamma}", "tokens", frozenset(), _first_token)


not_an_objective = 3


def no_objective() -> str:
    return "nothing"


def test_lookup_of_the_table():
    assert lookup("sft", **SETTINGS) is records.sft
    assert lookup("dft", **SETTINGS, reduce="samples").reduce == "samples"
    view = _view([[-1.0, -2.0, -3.0, -0.1], [-1.0]])
    _, weight = lookup("bft", **SETTINGS).weights(view)
    torch.testing.assert_close(weight, 1 - lowest_confidence(view, 3, "arithmetic") ** 2)


def test_lookup_of_a_users_own():
    found = lookup(f"{__name__}:mine", **SETTINGS)
    assert (found.name, found.reduce, found.needs) == ("mine", "samples", {"entropy"})
    assert [w.tolist() for w in found.weights(_view([[-1.0, -2.0]]))] == [[1.0, 1.0], [0.0]]
    assert lookup(f"{__name__}:scaled", **SETTINGS).name == "scaled 2.0"
    assert lookup(f"{__name__}:mine", **SETTINGS, reduce="tokens").reduce == "tokens"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bfd", "none of sft, dft, bft, .*, and no package.module:attribute"),
        ("tests.objective:", "no package.module:attribute"),
        ("no_such_package.module:x", "tried to import 'no_such_package.module'.*No module named 'no_such_package'"),
        (f"{__name__}:no_such_name", "which has no 'no_such_name'"),
        (f"{__name__}:not_an_objective", "neither an Objective nor a function that returns one: 3"),
        (f"{__name__}:no_objective", "neither an Objective nor a function that returns one: 'nothing'"),
    ],
)
def test_lookup_says_what_it_tried(name: str, message: str):
    with pytest.raises(UserError, match=f"objective.name: .*{message}"):
        lookup(name, **SETTINGS)


@pytest.mark.parametrize(
    ("settings", "field"),
    [((0,), "group_size"), ((4, 0.0), "gamma"), ((4, math.nan), "gamma"), ((4, 1.0, "harmonic"), "confidence")],
)
def test_balanced_refuses_nonsense(settings: tuple, field: str):
    with pytest.raises(UserError, match=f"objective.{field}: must be"):
        records.balanced(*settings)
