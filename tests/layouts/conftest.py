"""The data of the layout tests, and what one plain process makes of a case, once a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest

from tests.layouts import reference
from tests.layouts.runs import Case, Layout, Result, make_recipe, run, write_data


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
