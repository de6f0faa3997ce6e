"""`rows` of a source: a slice over all its files, whatever they are and however their rows are chunked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset

from bft_megatron.errors import FieldError
from bft_megatron.reading import readers, sources
from bft_megatron.recipe.sources import SourceSettings, source_settings


def row(i: int) -> dict[str, list[dict[str, str]]]:
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": str(i)}]}


@pytest.fixture(params=["jsonl", "json", "parquet"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten rows in two files of the kind, in chunks of three, with a blank line where lines can be blank."""
    monkeypatch.setattr(readers, "CHUNK_ROWS", 3)
    for name, rows in (("a", range(7)), ("b", range(7, 10))):
        path = tmp_path / f"{name}.{request.param}"
        if request.param == "parquet":
            Dataset.from_list([row(i) for i in rows]).to_parquet(path)
        elif request.param == "json":
            path.write_text(json.dumps([row(i) for i in rows]))
        else:
            path.write_text("\n\n".join(json.dumps(row(i)) for i in rows))
    return tmp_path


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(None, range(10)), (":4", range(4)), ("4:", range(4, 10)), ("2:8", range(2, 8)), ("8:50", range(8, 10))],
)
def test_slice(folder: Path, rows: str | None, expected: range):
    suffix = next(folder.glob("a.*")).suffix
    settings = SourceSettings(str(folder / f"*{suffix}"), rows=rows)
    found = sources.read(settings)
    assert [int(conversation.messages[1]["content"]) for conversation in found] == list(expected)
    if suffix == ".parquet":
        assert sources.open_source(settings).count_rows() == len(expected)


def test_places_are_those_of_the_file(folder: Path):
    suffix = next(folder.glob("a.*")).suffix
    conversation = next(sources.read(SourceSettings(str(folder / f"*{suffix}"), rows="8:")))
    assert conversation.line == {".jsonl": 3, ".json": 1, ".parquet": 2}[suffix]


def test_another_slice_is_another_source(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(json.dumps(row(0)))
    content = {
        sources.open_source(SourceSettings(str(tmp_path / "a.jsonl"), rows=r)).content for r in (None, ":1", "1:")
    }
    assert len(content) == 3


@pytest.mark.parametrize("rows", ["5", "5:5", "-1:", "a:b", 5, ""])
def test_no_slice_is_refused(rows: object):
    with pytest.raises(FieldError, match="rows"):
        source_settings([{"path": "a", "rows": rows}], "data.train")
