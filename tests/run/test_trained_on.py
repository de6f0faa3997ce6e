"""A run learns from the rows that it began with: what it is told when its data or their prepared rows have changed."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from bft_megatron.commands import request
from bft_megatron.errors import UserError
from bft_megatron.run import prepared, trained_on
from bft_megatron.run.folder import RunFolder
from tests.helpers.commands import run_command
from tests.helpers.material import TINY
from tests.helpers.runs import RECIPE, read_metrics

LINES = (TINY / "train.jsonl").read_text().splitlines(keepends=True)
STEPS = 2


def overrides(tmp_path: Path) -> list[str]:
    return [
        *(f"model={TINY}", f"data.train={tmp_path / 'mine.jsonl'}", f"data.valid={TINY / 'valid.jsonl'}"),
        *(f"output={tmp_path / 'run'}", f"train.iterations={STEPS}", "train.save_every=1", "train.warmup_iterations=0"),
    ]


def begin_again_after_step_1(folder: RunFolder) -> None:
    """Leave the folder as a run that was killed in step 2 does."""
    (folder.root / "done").unlink()
    shutil.rmtree(folder.checkpoint(STEPS))
    folder.write_tracker(1)


def flip_a_byte(folder: RunFolder, name: str) -> Path:
    """Change one byte of a file of the training rows; returns their folder."""
    (made,) = json.loads((folder.data / "rows.json").read_text())["train"]
    file = folder.data / made / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    return file.parent


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "mine.jsonl").write_text("".join(LINES))
    return tmp_path / "mine.jsonl"


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the first of two machines' ranks, which a scheduler has started."""
    monkeypatch.delenv(prepared.CHECKED_BY, raising=False)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)


def test_a_run_goes_on_with_its_own_rows_alone(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, words = RunFolder(tmp_path / "run"), ["train", RECIPE, *overrides(tmp_path)]
    assert run_command(monkeypatch, *words) == 0
    undisturbed = read_metrics(folder.metrics)
    begin_again_after_step_1(folder)
    record = folder.trained_on.read_text()

    source.write_text("".join(LINES[:-4]))
    for command in ("train", "prepare"):
        capfd.readouterr()
        assert run_command(monkeypatch, command, *words[1:]) == 2
        said = " ".join(capfd.readouterr().err.split())
        assert "data.train=" in said
        assert "holds checkpoints of a run on other rows of mine: 14 rows of hash" in said
        assert "choose another output folder" in said

    source.write_text("".join(LINES))
    os.utime(source, (0, 0))
    damaged = flip_a_byte(folder, "samples.arrow")
    assert run_command(monkeypatch, *words) == 0
    said = capfd.readouterr().out
    assert f"{damaged} is damaged (samples.arrow: bytes from 0" in said
    assert f"renamed to damaged_{damaged.name}, preparing the source anew" in said
    assert read_metrics(folder.metrics) == undisturbed
    assert folder.trained_on.read_text() == record

    folder.trained_on.unlink()
    begin_again_after_step_1(folder)
    assert run_command(monkeypatch, *words) == 0
    assert f"{folder.trained_on} is missing: nothing tells whether" in capfd.readouterr().out
    assert folder.trained_on.read_text() == record


def test_a_rank_of_a_job_refuses_other_rows(
    tmp_path: Path, source: Path, rank: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = request.read(RECIPE, overrides(tmp_path))
    rows = asked.prepare()
    asked.describe_run(rows)
    source.write_text("".join(LINES[:-4]))
    changed = asked.prepare()
    assert changed.train.parts[0].prepared.content != rows.train.parts[0].prepared.content
    asked.folder.checkpoints.mkdir()
    asked.folder.write_tracker(1)
    assert run_command(monkeypatch, "train", RECIPE, *overrides(tmp_path)) == 2
    said = capsys.readouterr().err
    assert re.search(r"data\.train=.*: .* on other rows of mine: 14 rows of hash \w{12}, not 12 ", said)


@pytest.mark.parametrize("name", ["samples.arrow", "rows.arrow", "prepared.json"])
def test_a_rank_of_a_job_refuses_damaged_rows(
    tmp_path: Path,
    source: Path,
    rank: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    asked = request.read(RECIPE, overrides(tmp_path))
    rows = asked.prepare()
    monkeypatch.delenv(prepared.CHECKED_BY)
    assert asked.rows_of_rank() == rows
    damaged = flip_a_byte(asked.folder, name)
    assert run_command(monkeypatch, "train", RECIPE, *overrides(tmp_path)) == 2
    said = capsys.readouterr().err
    assert re.search(rf"{damaged}: is damaged \({name}: .*run `bft-megatron prepare RECIPE`", said)
    assert damaged.exists()
    if name != "prepared.json":  # the others leave the contents to the machine's first rank
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert asked.rows_of_rank() == rows


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "{", "null", '{"train": 1}', '{"train": [], "valid": []}', '{"train": {}, "valid": 5}', "[" * 9**5],
)
def test_a_strange_file_of_names_is_one_error(tmp_path: Path, source: Path, rank: None, text: str) -> None:
    asked = request.read(RECIPE, overrides(tmp_path))
    asked.prepare()
    (asked.folder.data / "rows.json").write_text(text)
    with pytest.raises(UserError, match=r"rows\.json: names no prepared data: run `bft-megatron prepare RECIPE`"):
        asked.rows_of_rank()


def test_names_that_are_exchanged_are_refused(tmp_path: Path, source: Path, rank: None) -> None:
    asked = request.read(RECIPE, overrides(tmp_path))
    asked.prepare()
    names = json.loads((asked.folder.data / "rows.json").read_text())
    names["train"], names["valid"] = names["valid"], names["train"]
    (asked.folder.data / "rows.json").write_text(json.dumps(names))
    with pytest.raises(UserError, match=r"rows\.json: names no prepared data: run `bft-megatron prepare RECIPE`"):
        asked.rows_of_rank()


@pytest.mark.parametrize("text", ["", "[]", '{"train": [{}]}', '{"train": [{"name": "x", "rows": 1, "content": "y"}]}'])
def test_a_strange_record_is_said_and_written_anew(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    asked = request.read(RECIPE, overrides(tmp_path))
    rows = asked.prepare()
    asked.describe_run(rows)
    record = asked.folder.trained_on.read_text()
    asked.folder.checkpoints.mkdir()
    asked.folder.write_tracker(1)
    asked.folder.trained_on.write_text(text)
    trained_on.check(asked.folder, rows.train)
    capsys.readouterr()
    asked.describe_run(rows)
    assert capsys.readouterr().out.startswith(
        f"{asked.folder.trained_on} {'names other' if 'x' in text else 'is damaged'}"
    )
    assert asked.folder.trained_on.read_text() == record


def test_a_source_without_any_weight_is_said(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = request.read(RECIPE, overrides(tmp_path))
    asked.prepare()
    assert "weight 0" not in capsys.readouterr().out
    source.write_text("".join(json.dumps(json.loads(line) | {"weight": 0}) + "\n" for line in LINES))
    asked.prepare()
    assert "warning: every sample of mine has weight 0: nothing is learned from it" in capsys.readouterr().out
