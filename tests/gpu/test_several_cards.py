"""Ranks on a card each over NCCL, at 1, 2, 4 and 8 as far as this machine has cards: a step is the CPU's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu.ranks import run_on_cards
from tests.gpu.test_one_card import FP32, MINUTES
from tests.helpers.comparing import differences
from tests.helpers.runs import Case, Layout, make_recipe, run, write_data

LAYOUTS = [
    Layout(),
    Layout(tensor=2, sequence=True),
    Layout(pipeline=2),
    Layout(context=2),
    Layout(data=2),
    Layout(tensor=2, pipeline=2),
    Layout(tensor=2, context=2),
    Layout(tensor=2, pipeline=2, context=2, sequence=True),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_over_nccl_is_the_cpus(layout: Layout, tmp_path: Path):
    if (cards := torch.cuda.device_count()) < layout.world:
        pytest.skip(f"this machine has {cards} of the {layout.world} GPUs that {layout} takes")
    write_data(tmp_path)
    expected = run(make_recipe(tmp_path / "cpu", tmp_path, Case(), Layout(), 2, "device=cpu"), 1)
    made = make_recipe(tmp_path / "gpu", tmp_path, Case(), layout, 2, MINUTES)
    found = differences(run_on_cards(made, layout.world, shared=False), expected)
    worst = max(found, key=lambda name: found[name])
    assert found[worst] < FP32, worst
