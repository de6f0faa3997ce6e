"""A run of a mixture goes on on any other layout, whether or not its experts have an optimizer of their own there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.resuming import Resuming
from tests.helpers.runs import Layout, Result, write_data

ONE = Layout()
DP2 = Layout(data=2)
DP2_EP2 = Layout(data=2, expert=2)
TP2_EP2 = Layout(tensor=2, sequence=True, expert=2)
TP2_ETP2 = Layout(tensor=2, sequence=True, expert_tensor=2)
PP2_EP2 = Layout(pipeline=2, data=2, expert=2)
DP4_EP2_ETP2 = Layout(data=4, expert=2, expert_tensor=2)
OTHERS = [
    (DP2_EP2, Layout(data=4, expert=4)),
    (DP2_EP2, DP2),
    (DP2_EP2, TP2_EP2),
    (DP2_EP2, Layout(tensor=2, data=2, sequence=True, expert=2, expert_tensor=2)),
    (DP2_EP2, Layout(pipeline=2, virtual_pipeline=2, data=2, expert=2)),
    (DP2_EP2, Layout(context=2, data=2, expert=4)),
    (TP2_EP2, DP2_EP2),
    (TP2_EP2, Layout(tensor=2, pipeline=2, sequence=True, expert=2)),
    (TP2_ETP2, ONE),
    (TP2_ETP2, DP4_EP2_ETP2),
    (DP2, TP2_ETP2),
    (DP2, Layout(context=2, expert=2)),
    (DP2, DP4_EP2_ETP2),
]
"""Where the experts have an optimizer of their own: with EP above 1, and where ETP is not TP."""


MODEL, HALF_DENSE = "qwen3_moe", "half_dense"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Resuming:
    folder = tmp_path_factory.mktemp("experts")
    write_data(folder)
    return Resuming(folder, MODEL)


@pytest.fixture(scope="module")
def half_dense(mixture: Resuming) -> Resuming:
    folder = mixture.data / HALF_DENSE
    shutil.copytree(mixture.data / "qwen3_moe_dense", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mlp_only_layers": [0, 1]}))
    return Resuming(mixture.data, HALF_DENSE)


@pytest.fixture(scope="module")
def moved(mixture: Resuming) -> tuple[Path, Result]:
    """A run that began on one process and went on at EP 2 after half of its steps."""
    whole, _ = mixture.undisturbed(ONE)
    folder = mixture.data / "moved"
    shutil.copytree(whole, folder)
    return folder, mixture.resumed(folder, DP2_EP2, mixture.steps // 2)


def test_two_optimizers_take_what_one_saved(mixture: Resuming, moved: tuple[Path, Result]):
    mixture.assert_close(moved[1], mixture.undisturbed(ONE)[1])


def test_one_optimizer_takes_what_two_saved(mixture: Resuming, moved: tuple[Path, Result], tmp_path: Path):
    shutil.copytree(moved[0], tmp_path / "run")
    result = mixture.resumed(tmp_path / "run", ONE, mixture.steps - 1)
    mixture.assert_close(result, mixture.undisturbed(ONE)[1])


def test_the_same_layout_goes_on_to_the_bit(mixture: Resuming, moved: tuple[Path, Result], tmp_path: Path):
    mixture.check_bits(*moved, DP2_EP2, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [TP2_EP2, TP2_ETP2], ids=str)
def test_other_layouts_go_on_to_the_bit(mixture: Resuming, tmp_path: Path, layout: Layout):
    mixture.check_bits(*mixture.undisturbed(layout), layout, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), OTHERS, ids=str)
def test_another_layout_goes_on_with_the_same_numbers(mixture: Resuming, tmp_path: Path, first: Layout, then: Layout):
    mixture.check(first, then, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(PP2_EP2, PP2_EP2), (PP2_EP2, ONE), (ONE, PP2_EP2)], ids=str)
def test_a_stage_without_experts_goes_on(half_dense: Resuming, tmp_path: Path, first: Layout, then: Layout):
    half_dense.check(first, then, tmp_path / "run")
