"""A damaged line of metrics.jsonl is set aside; the others keep their bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from bft_megatron.run import metrics

FIRST = b'{"iteration": 1,  "loss": 2.50, "rows": [3], "sources": {"a": {"loss": 1}}, "lr": null, "skipped": true}\n'
VALID = b'{"iteration": 2, "split": "valid", "loss": 1e-3}\n'
LAST = b'{"iteration": 3, "loss": 2}\n'

BAD = [
    b'{"iteration": 2, "loss": 1.5\xb0}',
    b'{"iteration": 2, "lo',
    b"",
    b"\0\0\0\0",
    b"2",
    b"null",
    b'["iteration"]',
    b'{"loss": 2}',
    b'{"iteration": "2", "loss": 2}',
    b'{"iteration": 2.0, "loss": 2}',
    b'{"iteration": true, "loss": 2}',
    b'{"iteration": null, "loss": 2}',
    b'{"iteration": 2, "loss": "2.5"}',
    b'{"iteration": 2, "loss": NaN}',
    b'{"iteration": 2, "loss": 1e999}',
    b'{"iteration": 2, "split": 3, "loss": 2}',
    b'{"iteration": ' + b"9" * 5000 + b"}",
    b"[" * 100_000,
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_is_set_aside_and_the_others_keep_their_bytes(file: Path, bad: bytes):
    file.write_bytes(FIRST + bad + b"\n" + VALID + LAST)
    assert [line["iteration"] for line in metrics.read(file)] == [1, 2, 3]
    assert metrics.drop_after(file, 2) == f"{file}: 1 damaged lines (2) are set aside in metrics.rejected.jsonl"
    assert file.read_bytes() == FIRST + VALID
    assert metrics.rejected(file).read_bytes() == bad + b"\n"
    assert metrics.drop_after(file, 2) is None


def test_all_bad_lines_are_said_once_and_added_to_those_before(file: Path):
    metrics.rejected(file).write_bytes(b"before\n")
    file.write_bytes(b"x\n" * 12 + LAST)
    said = "12 damaged lines (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ...) are set aside in metrics.rejected.jsonl"
    assert metrics.drop_after(file, 3) == f"{file}: {said}"
    assert file.read_bytes() == LAST
    assert metrics.rejected(file).read_bytes() == b"before\n" + b"x\n" * 12


def test_lines_of_later_steps_are_dropped(file: Path):
    file.write_bytes(FIRST + VALID + LAST)
    assert metrics.drop_after(file, 3) is None
    assert file.read_bytes() == FIRST + VALID + LAST
    assert metrics.drop_after(file, 1) is None
    assert file.read_bytes() == FIRST
    assert metrics.drop_after(file, 0) is None
    assert file.read_bytes() == b""


def test_a_last_line_without_its_end_gets_one(file: Path):
    file.write_bytes(FIRST + LAST.rstrip())
    metrics.drop_after(file, 3)
    assert file.read_bytes() == FIRST + LAST


def test_without_a_file_there_is_nothing_to_drop(file: Path):
    assert metrics.read(file) == []
    assert metrics.drop_after(file, 3) is None
    assert not file.exists()
