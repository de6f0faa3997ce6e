"""A recipe of the tiny model, and the command line that refuses it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT, run_command

RECIPE = """\
model: {tiny}
init: random
data:
  train: {tiny}/train.jsonl
  seq_length: 128
train:
  global_batch_size: 8
  iterations: 2
output: {out}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(tiny=ROOT / "recipes/tiny", out=tmp_path / "out"))
    return path


@pytest.fixture
def refused(recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `train` says of a recipe that it refuses: status 2, no traceback, no run's folder made."""

    def refuse(*overrides: str) -> str:
        assert run_command(monkeypatch, "train", recipe, *overrides) == 2
        said = capfd.readouterr().err
        assert said.startswith("error: ")
        assert "Traceback" not in said
        assert len(said) < 1500
        assert not (recipe.parent / "out").exists()
        return said.removeprefix("error: ").strip()

    return refuse
