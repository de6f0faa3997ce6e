"""Compressed files and TSV: the same rows as plain ones, bounded by the row, and one line where they are damaged."""

from __future__ import annotations

import csv
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from bft_megatron.data.prepare import Prepared, prepare
from bft_megatron.errors import UserError
from bft_megatron.reading import readers, sources
from bft_megatron.recipe.schema import DataSettings
from bft_megatron.recipe.sources import COMPRESSIONS, SourceSettings
from tests.helpers.material import TINY

ROWS = [{"instruction": f"é {i}", "output": f'a,\n"{random.Random(i).random()}"', "weight": i} for i in range(600)]
LINES = "".join(f"{json.dumps(row)}\n" for row in ROWS).encode()


def compressed(content: bytes, name: str) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, name) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def table(delimiter: str, path: Path) -> bytes:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return path.read_bytes()


def found(path: Path) -> list[tuple[int, Any, float]]:
    return [(c.line, c.messages, c.weight) for c in sources.read(SourceSettings(str(path)))]


def prepared(folder: Path, path: Path, **settings: Any) -> Prepared:
    return prepare(path, TINY, DataSettings(str(path), seq_length=256, **settings), 1, folder / "cache")


@pytest.mark.parametrize("suffix", [*COMPRESSIONS])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_a_compressed_file_gives_the_same_rows(tmp_path: Path, kind: str, suffix: str) -> None:
    plain = tmp_path / f"rows.{kind}"
    if kind in ("csv", "tsv"):
        table("," if kind == "csv" else "\t", plain)
    else:
        plain.write_bytes(LINES if kind == "jsonl" else json.dumps(ROWS, indent=1).encode())
    path = tmp_path / f"rows.{kind}{suffix}"
    path.write_bytes(compressed(plain.read_bytes(), COMPRESSIONS[suffix]))
    assert found(path) == found(plain)
    assert [weight for _, _, weight in found(path)] == [float(i) for i in range(600)]
    opened = sources.open_source(path)
    assert opened.count_rows() is None
    assert opened.settings.label == "rows"


def test_tsv_is_csv_with_tabs(tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text('instruction\toutput\na, b\t"c\td"\ne\n')
    first, second = (found for chunk in readers.read_file(str(tmp_path / "rows.tsv"), 0, 100) for _, _, found in chunk)
    assert first == {"instruction": "a, b", "output": "c\td"}
    assert str(second) == f"{tmp_path}/rows.tsv:3: must have 2 cells, as the first line has"


def test_parts_of_a_file_that_were_compressed_one_by_one(tmp_path: Path) -> None:
    for suffix, name in COMPRESSIONS.items():
        path = tmp_path / f"rows.jsonl{suffix}"
        path.write_bytes(compressed(LINES, name) * 2)
        assert len(found(path)) == 1200


def test_a_folder_of_compressed_files(tmp_path: Path) -> None:
    for split, lines in (("train", LINES), ("test", LINES[: LINES.index(b"\n") + 1])):
        (tmp_path / f"{split}.jsonl.gz").write_bytes(compressed(lines, "gzip"))
    assert len(found(tmp_path)) == 600
    assert len(list(sources.read(SourceSettings(str(tmp_path), split="test")))) == 1


@pytest.mark.parametrize("suffix", [*COMPRESSIONS])
def test_a_cut_or_damaged_file_is_named_with_the_line_it_came_to(tmp_path: Path, suffix: str) -> None:
    name = COMPRESSIONS[suffix]
    whole, path = compressed(LINES, name), tmp_path / f"rows.jsonl{suffix}"
    for content in (whole[:-1], whole[: len(whole) // 2], LINES, whole + b"and more", whole[:20]):
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            prepared(tmp_path, path, on_error="skip")
        place, _, said = str(error.value).partition(": ")
        assert 1 <= int(place.removeprefix(f"{path}:")) <= 601
        assert said.startswith(f"not {name} that can be read, on this line or a later one: ")
        assert "\n" not in said
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_line_is_reached_before_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(compressed(LINES * 50, "gzip")[:-8])
    with pytest.raises(UserError) as error:
        list(sources.read(path))
    assert int(str(error.value).split(":")[1]) > 29_000


def test_a_line_that_swells_is_passed_without_being_held(tmp_path: Path) -> None:
    """16 MiB of one letter in some kilobytes: in a row of each kind, and in the cell of a table."""
    long, row = (f'{{"instruction": "x", "output": "{text}"}}'.encode() for text in ("a" * (1 << 24), "b"))
    paths = [tmp_path / f"rows.{kind}.gz" for kind in ("jsonl", "json", "csv")]
    for path, content in zip(
        paths, (long + b"\n" + row, b"[%b,%b]" % (long, row), b"a,b\nx,y\nx," + long), strict=True
    ):
        path.write_bytes(compressed(content, "gzip"))
        assert path.stat().st_size < 1 << 16
    tracemalloc.start()
    try:
        for path in paths[:2]:
            values = [value for chunk in sources.open_source(path).chunks(1000) for _, _, value in chunk]
            assert [isinstance(value, UserError) for value in values] == [True, False]
        with pytest.raises(UserError, match=r"rows\.csv\.gz:3: the row is longer than data\.max_row_bytes"):
            list(sources.open_source(paths[2]).chunks(1000))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 23


def test_what_is_hashed_is_the_file_and_how_it_is_read(tmp_path: Path) -> None:
    content = compressed(LINES, "gzip")
    for name in ("a.jsonl.gz", "b.JSONL.GZ", "c.gz", "d.jsonl"):
        (tmp_path / name).write_bytes(content)
    first, second, third, fourth = (sources.open_source(path).content for path in sorted(tmp_path.iterdir()))
    assert first == second == third != fourth
