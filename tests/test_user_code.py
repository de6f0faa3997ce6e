"""A user's own objective that fails, wherever it does: status 2 with file and line of the user's code."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

from bft_megatron import user_code
from bft_megatron.errors import FieldError
from bft_megatron.objective.lookup import lookup
from bft_megatron.objective.records import Objective
from tests.helpers.background import arguments
from tests.helpers.commands import command, run_command

SETTINGS = {"group_size": 3, "gamma": 2.0, "confidence": "geometric"}
GOOD = "from bft_megatron.objective.records import sft\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that modules are imported from, and forgotten after the test."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    importlib.invalidate_caches()
    return tmp_path


@pytest.mark.parametrize(
    ("source", "line", "message"),
    [
        ("def mine(:\n", 1, "SyntaxError: invalid syntax"),
        ("import os\n\xff\n".encode("latin-1"), 2, "SyntaxError: .*codec can't decode"),
    ],
)
def test_a_syntax_error_is_found_before_anything_starts(
    folder: Path,
    source: str | bytes,
    line: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    (folder / "broken.py").write_bytes(source if isinstance(source, bytes) else source.encode())
    assert run_command(monkeypatch, *arguments(folder / "run", "objective.name=broken:mine")) == 2
    said = capfd.readouterr().err
    assert re.fullmatch(rf"error: objective.name=broken:mine: {folder}/broken.py:{line}: {message}.*\n", said), said
    assert not (folder / "run").exists()


def test_a_package_is_not_run_when_its_module_is_looked_for(folder: Path):
    (folder / "package/inner").mkdir(parents=True)
    (folder / "package/__init__.py").write_text("import os\nos._exit(0)\n")
    (folder / "package/inner/module.py").write_text("import os\nos._exit(0)\n")
    user_code.check_source("objective.name", "package.inner.module")
    with pytest.raises(FieldError, match=r"there is no module 'package\.other' here"):
        user_code.check_source("objective.name", "package.other")
    (folder / "package/__init__.py").write_text("\ndef broken(:\n")
    with pytest.raises(FieldError, match=r"package/__init__.py:2: SyntaxError: invalid syntax"):
        user_code.check_source("objective.name", "package.inner.module")


@pytest.mark.parametrize(
    "module", ["no_such_module", "no_such_package.module", "json.no_such_module", "json.decoder.x"]
)
def test_a_module_that_is_not_there(module: str):
    with pytest.raises(FieldError, match=f"there is no module '{module}' here"):
        user_code.check_source("objective.name", module)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import sys\nsys.exit()", "mine.py:2: SystemExit"),
        ("import no_such_module", "mine.py:1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("from helper import half", r"helper.py:2: ZeroDivisionError: division by zero"),
        ("def made():\n    raise KeyError('gamma')", "mine.py:2: KeyError: 'gamma'"),
        ("def made():\n    exit(0)", "mine.py:2: SystemExit: 0"),
        ("import json\ndef made(gamma):\n    json.loads('[')", "mine.py:3: JSONDecodeError: Expecting value"),
        (
            f"{GOOD}from dataclasses import replace\nmade = replace(sft, reduce='sum')",
            "has reduce 'sum', which is none",
        ),
        (f"{GOOD}from dataclasses import replace\nmade = replace(sft, needs=['entropy'])", "has needs .* no set"),
        (
            f"{GOOD}from dataclasses import replace\nmade = replace(sft, weights=3)",
            "has weights 3, which is no function",
        ),
    ],
)
def test_an_objective_that_cannot_be_made(folder: Path, source: str, message: str):
    (folder / "mine.py").write_text(source)
    (folder / "helper.py").write_text("\nhalf = 1 / 0\n")
    with pytest.raises(FieldError, match=rf"objective.name: .*{message}"):
        lookup("mine:made", **SETTINGS)


def test_weights_that_run_out_of_memory_are_no_fault_of_the_code(folder: Path):
    (folder / "mine.py").write_text(f"{GOOD}def weights(view):\n    raise MemoryError\nmade = sft\n")
    weights = importlib.import_module("mine").weights
    importlib.import_module("mine").made = Objective("mine", "tokens", frozenset(), weights)
    with pytest.raises(MemoryError):
        lookup("mine:made", **SETTINGS).weights(None)


IN_A_STEP = """
from dataclasses import replace
import torch.distributed as dist
from bft_megatron.objective.records import sft

def weights(view):
    if dist.get_rank() == 1:
        view.no_such_quantity
    return sft.weights(view)

made = replace(sft, weights=weights)
"""


def test_weights_that_raise_on_one_rank_are_said_by_that_rank(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    (folder / "mine.py").write_text(IN_A_STEP)
    out = folder / "run"
    assert (
        run_command(monkeypatch, *arguments(out, "objective.name=mine:made", "data.valid=null", "train.keep_best=0"))
        == 2
    )
    said = capfd.readouterr().out
    fault = rf"{folder}/mine.py:8: AttributeError: 'View' object has no attribute 'no_such_quantity'"
    assert re.search(
        rf"^rank 1: objective.name=mine:made: {fault}; after step 0; rows of its micro-batch: ", said, re.M
    )
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_rank_that_ends_with_0_and_without_its_work_is_a_failure(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "mine.py").write_text("import os\nos._exit(0)\n")
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{Path(user_code.__file__).parents[1]}")
    done = command(*arguments(folder / "run", "objective.name=mine:made", "parallel.tensor=1"))
    assert done.returncode == 1
    assert f"without their work done; {folder}/run/logs says why" in done.stdout
