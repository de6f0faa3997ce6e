"""A run of a mixture goes on on any other layout, whether or not its experts have an optimizer of their own there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.hub import find_model
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.folder import RunFolder
from bft_megatron.run.prepared import prepare_rows
from tests.helpers.checkpoints import tensors
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


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    write_data(folder)
    return folder


def _recipe(data: Path, model: str, layout: Layout, folder: Path) -> Recipe:
    words = [f"train.save_every={SAVED}", "train.validate_every=1", "train.clip_grad=1.0"]
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


def _resumed(data: Path, model: str, first: Layout, then: Layout, folder: Path) -> Result:
    """Go on on another layout after step 2."""
    shutil.copytree(_undisturbed(data, model, first)[0], folder)
    run = RunFolder(folder)
    shutil.rmtree(run.checkpoint(STEPS))
    (folder / "done").unlink()
    run.write_tracker(SAVED)
    return _run(_recipe(data, model, then, folder), then)


def _check(data: Path, model: str, first: Layout, then: Layout, folder: Path) -> None:
    whole, expected = _undisturbed(data, model, first)
    result = _resumed(data, model, first, then, folder)
    assert [line["iteration"] for line in result.train] == [1, 2, 3, 4]
    found = differences(result, expected)
    assert max(found.values()) <= CLOSE, found
    found, wanted = (tensors(RunFolder(root).checkpoint(STEPS)) for root in (folder, whole))
    assert found.keys() == wanted.keys()
    if first == then:
        assert result == expected
        assert [name for name in wanted if not found[name].equal(wanted[name])] == []


@pytest.mark.parametrize(("first", "then"), [(DP2_EP2, DP2_EP2), (DP2_EP2, TP2_ETP2), (TP2_ETP2, ONE)], ids=str)
def test_goes_on(data: Path, tmp_path: Path, first: Layout, then: Layout):
    _check(data, "qwen3_moe", first, then, tmp_path / "run")
