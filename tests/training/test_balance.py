"""The routers' own losses, and the load of the experts, are those of their definition in float64, whatever the layout
and the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest

from tests.helpers import model_reference as reference
from tests.helpers.comparing import TOLERANCE, assert_same, differences
from tests.helpers.router_reference import Routers
from tests.helpers.runs import Case, Layout, Result, make_recipe, run

PACKED, PADDED = Case("bft", model="qwen3_moe"), Case("sft", model="qwen3_moe_dense", packing=False)
LOSSES = ("moe.balance=0.02", "moe.z_loss=0.0005")


@pytest.fixture(scope="session")
def defined(data: Path) -> Callable[..., Result]:
    """(case, overrides) -> the first step in float64 with the routers' losses and the experts' load."""

    @lru_cache
    def first_step(case: Case, *overrides: str) -> Result:
        made = make_recipe(data / "plain", data, case, Layout(), 1, *LOSSES, *overrides)
        routers = Routers(made)
        found = reference.first_step(made, adapt=routers.add_gradients)
        return replace(found, train=[found.train[0] | routers.report()])

    return first_step


def balanced(data: Path, case: Case, layout: Layout, *overrides: str) -> Result:
    folder = data / f"balanced-{case}-{layout}{len(overrides)}"
    return run(make_recipe(folder, data, case, layout, 1, *LOSSES, *overrides), layout.world)


LAYOUTS = [
    Layout(tensor=2, sequence=True, expert=2),
    *(
        pytest.param(layout, marks=pytest.mark.slow)
        for layout in (
            Layout(),
            Layout(context=2, data=2, expert=4),
            Layout(pipeline=2, data=2, expert=2),
            Layout(pipeline=2, virtual_pipeline=2),
            Layout(tensor=2, context=2, sequence=True, expert=2),
            Layout(tensor=2, pipeline=2, sequence=True, expert=2),
        )
    ),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_has_the_gradients_of_the_definition(layout: Layout, data: Path, defined: Callable[..., Result]):
    assert_same(balanced(data, PACKED, layout), defined(PACKED))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [Layout(), Layout(micro_batch_size=2, context=2), Layout(micro_batch_size=4)], ids=str
)
def test_every_micro_batch_has_the_gradients_of_the_definition(
    layout: Layout, data: Path, defined: Callable[..., Result]
):
    assert_same(balanced(data, PADDED, layout), defined(PADDED))


def test_a_micro_batch_without_samples_adds_nothing(data: Path, defined: Callable[..., Result]):
    """Four rows of eight are left at the end of the data."""
    of_the_end = "train.iterations=null", "train.epochs=0.08"
    result = balanced(data, PADDED, Layout(micro_batch_size=4), *of_the_end)
    assert result.train[0]["samples"] == 4
    assert_same(result, defined(PADDED, *of_the_end))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["full", "selective"])
def test_layers_that_are_computed_again_count_once(how: str, data: Path, defined: Callable[..., Result]):
    flags = {
        "full": ("megatron.recompute-method=uniform", "megatron.recompute-num-layers=1"),
        "selective": ("megatron.recompute-modules=moe",),
    }[how]
    layout = Layout(tensor=2, pipeline=2, sequence=True, micro_batch_size=2)
    assert_same(balanced(data, PADDED, layout, f"megatron.recompute-granularity={how}", *flags), defined(PADDED))


def test_the_losses_matter(data: Path, defined: Callable[..., Result], plain: Callable[[Case, int], Result]):
    """Without them the gradients are others by far more than the tolerance."""
    assert differences(plain(PADDED, 1), defined(PADDED))["gradient model.layers.1.mlp.gate.weight"] > 1000 * TOLERANCE
