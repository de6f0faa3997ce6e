"""A run goes on on another layout with the same rows and the same numbers."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bft_megatron.errors import FieldError
from bft_megatron.hf.architectures import read_config
from bft_megatron.processes.terminal import output_to
from bft_megatron.recipe import reader
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.folder import RunFolder
from bft_megatron.run.prepared import RunRows, prepare_rows
from bft_megatron.run.resolved import Run
from bft_megatron.training import loop
from tests.helpers.comparing import assert_same
from tests.helpers.runs import MODEL, RECIPE, Case, Layout, Result, make_recipe, read_metrics, write_data
from tests.helpers.world import run_world

STEPS, SAVED = 4, 2


def _run(made: Recipe, layout: Layout) -> Result:
    prepared = prepare_rows(made, MODEL, read_config(MODEL).vocab_size)
    run_world(layout.world, _train, made, prepared, megatron=True)
    return Result(*read_metrics(RunFolder.of(made).metrics))


def _train(made: Recipe, prepared: RunRows) -> None:
    with output_to(RunFolder.of(made).log(int(os.environ["RANK"]))) as console:
        loop.train(Run(made, read_config(MODEL), MODEL, prepared, int(os.environ["WORLD_SIZE"])), console)


def _recipe(folder: Path, data: Path, layout: Layout) -> Recipe:
    """Windows of one process, so that the numbers do not depend on the context-parallel size."""
    words = [f"train.save_every={SAVED}", "train.validate_every=1"]
    return make_recipe(folder, data, Case(pad_multiple=4), layout, STEPS, *words)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run of four steps at TP 2, PP 2, DP 2 as it was after two of them, and what it reported in all."""
    folder = tmp_path_factory.mktemp("reshard")
    write_data(folder)
    layout = Layout(tensor=2, pipeline=2, data=2, sequence=True)
    result = _run(_recipe(folder / "run", folder, layout), layout)
    shutil.rmtree(folder / "run" / "checkpoints" / f"iter_{STEPS:07d}")
    return folder, result


@pytest.mark.parametrize("layout", [Layout(pipeline=2, context=2), Layout(data=4), Layout()], ids=str)
def test_goes_on_with_the_same_losses_on_another_layout(begun: tuple[Path, Result], tmp_path: Path, layout: Layout):
    folder, expected = begun
    shutil.copytree(folder / "run", tmp_path / "run")
    result = _run(_recipe(tmp_path / "run", folder, layout), layout)
    assert [line["iteration"] for line in result.train] == [1, 2, 3, 4]
    assert result.train[:SAVED] == expected.train[:SAVED]  # these were not taken again
    assert_same(result, expected)


def _began_with(root: Path, context: int, pad_multiple: int | None = None) -> None:
    """A folder as a run with this context leaves it, checkpoints aside."""
    made = _left_out(root, context)
    made = replace(made, data=replace(made.data, pad_multiple=pad_multiple))
    folder = RunFolder(root)
    folder.checkpoints.mkdir(parents=True)
    folder.write_config(folder.with_pack(made), MODEL)
    folder.write_tracker(1)


def _left_out(root: Path, context: int) -> Recipe:
    return reader.load(RECIPE, [f"output={root}", f"model={MODEL}", f"parallel.context={context}"])


@pytest.mark.parametrize(("first", "then", "kept"), [(2, 1, 4), (4, 2, 8), (1, 1, 1), (2, 2, 4)])
def test_a_pad_multiple_that_is_left_out_stays_as_the_run_began(tmp_path: Path, first: int, then: int, kept: int):
    _began_with(tmp_path, first)
    resumed = RunFolder(tmp_path).with_pack(_left_out(tmp_path, then))
    assert resumed.data.pad_multiple == kept
    RunFolder(tmp_path).check_continues(resumed)


def test_a_context_that_the_pack_cannot_be_cut_for_is_refused_with_the_way_out(tmp_path: Path):
    _began_with(tmp_path, 1)
    with pytest.raises(FieldError) as error:
        RunFolder(tmp_path).with_pack(_left_out(tmp_path, 2))
    assert error.value.field == "parallel.context"
    assert "padded to a multiple of 1, and context 2 needs 4" in error.value.message
    assert "begin anew in another output folder with data.pad_multiple=4" in error.value.message


def test_another_pad_multiple_than_the_runs_is_refused(tmp_path: Path):
    _began_with(tmp_path, 2, pad_multiple=8)
    made = _left_out(tmp_path, 2)
    changed = replace(made, data=replace(made.data, pad_multiple=4))
    with pytest.raises(FieldError, match=r"a run with data\.pad_multiple 8, not 4"):
        RunFolder(tmp_path).check_continues(changed)
