"""The family's gradients against those of the losses that their authors define, by autograd in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bft_megatron.errors import FieldError
from bft_megatron.objective import family
from bft_megatron.objective.lookup import lookup
from bft_megatron.objective.loss import objective_sum
from bft_megatron.objective.records import Objective
from bft_megatron.objective.view import Geometry
from bft_megatron.recipe import objectives

SETTINGS = {"group_size": 4, "gamma": 1.0, "confidence": "geometric"}


@pytest.mark.parametrize(
    ("objective", "definition"),
    [
        (family.power(0.3), lambda p: (1 - p**0.3) / 0.3),
        (family.power(1.0), lambda p: 1 - p),
        (family.power(4.0), lambda p: (1 - p**4) / 4),
        (family.threshold(0.25), lambda p: torch.where(p >= 0.25, -p.log(), 0.0)),
        (family.focal(0.5), lambda p: -((1 - p) ** 0.5) * p.log()),
        (family.focal(2.0), lambda p: -((1 - p) ** 2) * p.log()),
        (family.focal(0.0), lambda p: -p.log()),
    ],
)
def test_the_gradient_is_that_of_the_definition(objective: Objective, definition: Callable[[Tensor], Tensor]):
    p = torch.linspace(1e-6, 1 - 1e-6, 101, dtype=torch.float64)
    logp = p.log().requires_grad_()
    definition(logp.exp()).sum().backward()
    found = _gradient(objective, p)
    torch.testing.assert_close(found.double(), logp.grad, rtol=1e-5, atol=1e-7)


def test_a_token_that_is_certain_has_a_finite_weight():
    assert _gradient(family.focal(0.5), torch.ones(1, dtype=torch.float64)).tolist() == [0.0]


def _gradient(objective: Objective, p: Tensor) -> Tensor:
    logp = p.log().float().requires_grad_()
    labels, n = torch.zeros(len(p), dtype=torch.int64), len(p)
    geometry = Geometry(labels, torch.tensor([0, n]), torch.ones(1, dtype=torch.bool), torch.ones(1))
    result = objective_sum(objective, geometry, geometry.view(logp), logp)
    assert result.count == n
    result.loss.backward()
    return logp.grad


def test_every_name_of_a_recipe_is_an_objective():
    for name, ranges in objectives.OPTIONS.items():
        assert lookup(name, **SETTINGS, options={option: 0.5 for option in ranges}).name == name


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("power", {}, "objective.options: power needs alpha"),
        ("power", {"alpha": 0}, "objective.options.alpha: must be above 0, not 0"),
        ("power", {"alpha": "half"}, "objective.options.alpha: must be a number, not half"),
        ("power", {"alpha": 1, "beta": 2}, "objective.options.beta: power has no such option; it has alpha"),
        ("bft", {"gamma": 2}, "objective.options.gamma: bft has no such option; it has none"),
        ("threshold", {"q": 1}, "objective.options.q: must be at least 0 and below 1, not 1"),
    ],
)
def test_options_of_built_in_objectives(name: str, options: dict, message: str):
    with pytest.raises(FieldError) as e:
        lookup(name, **SETTINGS, options=options)
    assert str(e.value) == message


def mine(tau: float, gamma: float, kind: bool = False) -> Objective:
    return Objective(f"mine {tau} {gamma} {kind}", "tokens", frozenset(), lambda view: (view.logp, view.weight))


def test_options_of_a_users_own():
    name = f"{__name__}:mine"
    assert lookup(name, **SETTINGS, options={"tau": 3}).name == "mine 3 1.0 False"
    assert lookup(name, **SETTINGS, options={"tau": 0.5, "gamma": 7.0, "kind": True}).name == "mine 0.5 7.0 True"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "objective.options: {name} needs tau"),
        ({"tau": "x"}, "objective.options.tau: must be of the type float, not x"),
        ({"tau": float("nan")}, "objective.options.tau: must be finite, not nan"),
        ({"tau": 1.0, "kind": 1}, "objective.options.kind: must be of the type bool, not 1"),
        ({"tao": 1.0}, "objective.options.tao: {name} has no such option; it has tau, kind"),
    ],
)
def test_options_that_a_users_own_cannot_have(options: dict, message: str):
    name = f"{__name__}:mine"
    with pytest.raises(FieldError) as e:
        lookup(name, **SETTINGS, options=options)
    assert str(e.value) == message.format(name=name)
