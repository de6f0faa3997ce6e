"""Ranks that share one card, their collectives staged through the host: a step is the CPU's, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gpu.ranks import run_on_cards
from tests.helpers.comparing import differences
from tests.helpers.runs import Case, Layout, Result, make_recipe, run, write_data

FP32 = 5e-5
"""Relative: a GPU adds in another order than a CPU."""
MINUTES = "megatron.distributed-timeout-minutes=2"
TRITON = ("objective.head=chunked", "objective.kernels=triton")
EXPERTS = Case(model="qwen3_moe")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def on_the_cpu(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Result]:
    """One process's run of a case on the CPU."""
    found: dict[Case, Result] = {}

    def result(case: Case) -> Result:
        if case not in found:
            folder = tmp_path_factory.mktemp("cpu")
            found[case] = run(make_recipe(folder, data, case, Layout(), 2, "device=cpu"), 1)
        return found[case]

    return result


@pytest.mark.parametrize(
    ("case", "layout", "overrides"),
    [
        pytest.param(Case(), Layout(tensor=2, sequence=True), (), id="tp2-sp"),
        pytest.param(Case(), Layout(tensor=2), TRITON, id="tp2-chunked"),
        pytest.param(Case(), Layout(pipeline=2), (), id="pp2"),
        pytest.param(Case(), Layout(context=2), (), id="cp2"),
        pytest.param(EXPERTS, Layout(data=2, expert=2), (), id="ep2"),
        pytest.param(Case(), Layout(data=2), (), id="dp2"),
        pytest.param(Case(), Layout(tensor=2, pipeline=2), (), id="tp2-pp2"),
    ],
)
def test_a_layout_is_the_cpus(
    case: Case,
    layout: Layout,
    overrides: tuple[str, ...],
    data: Path,
    on_the_cpu: Callable[[Case], Result],
    tmp_path: Path,
):
    expected = on_the_cpu(case)
    made = make_recipe(tmp_path / "gpu", data, case, layout, 2, MINUTES, *overrides)
    result = run_on_cards(made, layout.world, shared=True)
    assert result.gradients.keys() == expected.gradients.keys()
    found = differences(result, expected)
    worst = max(found, key=lambda name: found[name])
    assert found[worst] < FP32, worst
