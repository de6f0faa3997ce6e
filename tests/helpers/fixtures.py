"""What is made once a session and shared: small models, the tiny conversations, runs and their references."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest

from tests.helpers import model_reference as reference
from tests.helpers import tiny_models
from tests.helpers.background import arguments
from tests.helpers.commands import run_command
from tests.helpers.runs import Case, Layout, Result, make_recipe, run, write_data
from tests.helpers.tiny_models import SavedModel


@pytest.fixture(scope="session")
def models_tied_otherwise(tmp_path_factory: pytest.TempPathFactory) -> list[SavedModel]:
    """The same architectures, those tied whose models in `models` are not, and the other way round."""
    folder, found = tmp_path_factory.mktemp("otherwise"), []
    for name in tiny_models.ARCHITECTURES:
        tied = tiny_models.config(name).tie_word_embeddings
        model = tiny_models.save(name, folder / name, tie_word_embeddings=not tied)
        found.append(SavedModel(name, folder / name, tiny_models.logits(model)))
    return found


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[SavedModel]:
    return _saved(tmp_path_factory.mktemp("models"), tiny_models.ARCHITECTURES)


@pytest.fixture(scope="session")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> list[SavedModel]:
    return _saved(tmp_path_factory.mktemp("mixtures"), tiny_models.MIXTURES, shard_size="400KB")


@pytest.fixture(scope="session")
def hybrids(tmp_path_factory: pytest.TempPathFactory) -> list[SavedModel]:
    return _saved(tmp_path_factory.mktemp("hybrids"), tiny_models.HYBRIDS, shard_size="400KB")


def _saved(folder: Path, names: list[str], **options: str) -> list[SavedModel]:
    return [
        SavedModel(name, folder / name, tiny_models.logits(tiny_models.save(name, folder / name, **options)))
        for name in names
    ]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    write_data(folder)
    return folder


@pytest.fixture(scope="session")
def plain(data: Path) -> Callable[[Case, int], Result]:
    """(case, CP size whose chunks windows stay in) -> the float64 reference of step 1."""

    @lru_cache
    def first_step(case: Case, windows_cp: int) -> Result:
        return reference.first_step(make_recipe(data / "plain", data, case, Layout(), 1), windows_cp)

    return first_step


@pytest.fixture(scope="session")
def one_process(data: Path) -> Callable[[Case], Result]:
    """case -> two steps of the same code on one process."""

    @lru_cache
    def two_steps(case: Case) -> Result:
        return run(make_recipe(data / f"{case}-one", data, case, Layout(), 2), 1)

    return two_steps


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed, with checkpoints of steps 2, 4 and 6; a test that damages one copies it first."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert run_command(patch, *arguments(out, "train.save_every=2", "train.keep_last=3")) == 0
    return out
