"""A run of a mixture goes on on any other layout, whether or not its experts have an optimizer of their own there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.hub import find_model
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.folder import RunFolder
from bft_megatron.run.prepared import prepare_rows
from tests.helpers.checkpoints import assert_same_tensors, tensors
from tests.helpers.comparing import differences
from tests.helpers.runs import Case, Layout, Result, do_nothing, make_recipe, read_metrics, train_rank, write_data
from tests.helpers.world import run_world

STEPS, SAVED = 4, 2
CLOSE = 1e-6
"""Of a number that is reported, relative."""

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
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    write_data(folder)
    shutil.copytree(folder / "qwen3_moe_dense", folder / HALF_DENSE)
    config = json.loads((folder / HALF_DENSE / "config.json").read_text())
    (folder / HALF_DENSE / "config.json").write_text(json.dumps(config | {"mlp_only_layers": [0, 1]}))
    return folder


def _recipe(data: Path, model: str, layout: Layout, folder: Path) -> Recipe:
    words = ["train.save_every=1", f"train.keep_last={STEPS}", f"train.validate_every={STEPS}"]
    words += ["train.clip_grad=1", "train.global_batch_size=4"]
    return make_recipe(folder, data, Case(model=model, pad_multiple=4), layout, STEPS, *words)


def _run(made: Recipe, layout: Layout) -> Result:
    model = find_model(made.model)
    prepared = prepare_rows(made, model, read_config(model).vocab_size)
    run_world(layout.world, train_rank, made, prepared, do_nothing, megatron=True)
    return Result(*read_metrics(RunFolder.of(made).metrics))


def _undisturbed(data: Path, model: str, layout: Layout) -> tuple[Path, Result]:
    """The folder of a whole run and what it reported; taken once."""
    folder = data / f"{model}-{layout}"
    made = _recipe(data, model, layout, folder)
    if folder.exists():
        return folder, Result(*read_metrics(RunFolder.of(made).metrics))
    return folder, _run(made, layout)


def _resumed(data: Path, model: str, folder: Path, layout: Layout, step: int) -> Result:
    """Go on on a layout after a step, as if the later ones had not been saved."""
    run = RunFolder(folder)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(run.checkpoint(later))
    (folder / "done").unlink()
    run.write_tracker(step)
    return _run(_recipe(data, model, layout, folder), layout)


def _check(data: Path, model: str, first: Layout, then: Layout, folder: Path) -> None:
    """A run that goes on on another layout after half of its steps reports and leaves what it would have on its own."""
    whole, expected = _undisturbed(data, model, first)
    shutil.copytree(whole, folder)
    _assert_close(_resumed(data, model, folder, then, SAVED), expected)
    assert _tensors(folder).keys() == _tensors(whole).keys()


def _assert_close(result: Result, expected: Result) -> None:
    assert [line["iteration"] for line in result.train] == list(range(1, STEPS + 1))
    found = differences(result, expected)
    assert max(found.values()) <= CLOSE, found


def _tensors(folder: Path) -> dict[str, Any]:
    return tensors(RunFolder(folder).checkpoint(STEPS))


@pytest.fixture(scope="module")
def moved(data: Path) -> tuple[Path, Result]:
    """A run that began on one process and went on at EP 2 after half of its steps."""
    whole, _ = _undisturbed(data, MODEL, ONE)
    shutil.copytree(whole, data / "moved")
    return data / "moved", _resumed(data, MODEL, data / "moved", DP2_EP2, SAVED)


def test_two_optimizers_take_what_one_saved(data: Path, moved: tuple[Path, Result]):
    _assert_close(moved[1], _undisturbed(data, MODEL, ONE)[1])


def test_one_optimizer_takes_what_two_saved(data: Path, moved: tuple[Path, Result], tmp_path: Path):
    shutil.copytree(moved[0], tmp_path / "run")
    result = _resumed(data, MODEL, tmp_path / "run", ONE, STEPS - 1)
    _assert_close(result, _undisturbed(data, MODEL, ONE)[1])


def test_the_same_layout_goes_on_to_the_bit(data: Path, moved: tuple[Path, Result], tmp_path: Path):
    _check_bits(data, *moved, DP2_EP2, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [TP2_EP2, TP2_ETP2], ids=str)
def test_other_layouts_go_on_to_the_bit(data: Path, tmp_path: Path, layout: Layout):
    _check_bits(data, *_undisturbed(data, MODEL, layout), layout, tmp_path / "run")


def _check_bits(data: Path, whole: Path, expected: Result, layout: Layout, folder: Path) -> None:
    shutil.copytree(whole, folder)
    assert _resumed(data, MODEL, folder, layout, STEPS - 1) == expected
    assert_same_tensors(*(RunFolder(root).checkpoint(STEPS) for root in (folder, whole)))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), OTHERS, ids=str)
def test_another_layout_goes_on_with_the_same_numbers(data: Path, tmp_path: Path, first: Layout, then: Layout):
    _check(data, MODEL, first, then, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(PP2_EP2, PP2_EP2), (PP2_EP2, ONE), (ONE, PP2_EP2)], ids=str)
def test_a_stage_without_experts_goes_on(data: Path, tmp_path: Path, first: Layout, then: Layout):
    _check(data, HALF_DENSE, first, then, tmp_path / "run")
