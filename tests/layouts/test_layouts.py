"""Loss, every reported number and every parameter's gradient are the same on every layout.

Step 1 is held to plain float64: transformers' model, one sample at a time, the objective in Python loops. Step 2, after
an update of every parameter, is held to one process.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.cases import CHOSEN, CHOSEN_SLOW, OBJECTIVES, drawn
from tests.helpers.comparing import assert_same
from tests.helpers.runs import Case, Layout, Result, make_recipe, run

STEPS = 2


@pytest.mark.parametrize("case", OBJECTIVES, ids=str)
def test_one_process_agrees_with_plain_float64(
    case: Case, plain: Callable[[Case, int], Result], one_process: Callable[[Case], Result]
):
    assert_same(one_process(case), plain(case, 1))


def test_packed_rows_and_padded_rows_of_the_same_samples_give_the_same_numbers(data: Path):
    """One global batch that holds each sample once: packed, padded, and (the reference) one by one."""
    results = {}
    for packing in (True, False):
        whole = ("train.global_batch_size=64", "train.epochs=1")
        made = make_recipe(data / f"epoch-{packing}", data, Case(packing=packing), Layout(), 0, *whole)
        results[packing] = run(made, 1)
    assert results[True].train[0]["samples"] == 45
    assert_same(results[True], results[False])


SLOW = [pytest.param(*pair, marks=pytest.mark.slow) for pair in (*CHOSEN_SLOW, *drawn(6))]


@pytest.mark.parametrize(("case", "layout"), [*CHOSEN, *SLOW], ids=str)
def test_layout_agrees_with_plain_float64_and_with_one_process(
    case: Case,
    layout: Layout,
    data: Path,
    plain: Callable[[Case, int], Result],
    one_process: Callable[[Case], Result],
):
    result = run(make_recipe(data / f"{case}-{layout}", data, case, layout, STEPS), layout.world)
    chunks_matter = case.cp_windows == "per_rank"
    assert len(result.train) == STEPS
    assert_same(result, plain(case, layout.context if chunks_matter else 1))
    if not chunks_matter:
        assert_same(result, one_process(case))
