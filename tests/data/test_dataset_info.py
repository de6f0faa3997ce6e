"""dataset_info.json and folders of data with anything in them: read, or refused by the field, the file and the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bft_megatron.errors import FieldError
from bft_megatron.reading.sources import open_source
from bft_megatron.recipe.sources import SourceSettings

GOOD = {"file_name": "rows.jsonl", "columns": {"prompt": "question", "response": "answer"}}


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("info")
    (folder / "rows.jsonl").write_text('{"question": "1?", "answer": "1"}\n')
    return folder / "dataset_info.json"


def said_of(info: Path, content: Any, name: str | None = "mine") -> str:
    """The refusal of a dataset_info.json with a content; "" if its entry is opened."""
    info.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    said = ""
    try:
        open_source(SourceSettings(str(info), name), "data.train")
    except FieldError as error:
        said = str(error)
    assert not said or said.startswith("data.train: ")
    assert "\n" not in said
    return said


def test_an_entry_with_null_and_empty_values_is_read(info: Path):
    assert said_of(info, {"mine": GOOD | {"split": None, "subset": "", "tags": None, "formatting": None}}) == ""


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("columns", ["a"], '`columns` must be an object of names, such as {"prompt": "question"}, not ["a"]'),
        (
            "columns",
            {"prompt": 3},
            '`columns` must be an object of names, such as {"prompt": "question"}, not {"prompt"',
        ),
        ("columns", "question", "`columns` must be an object of names"),
        ("tags", [1], "`tags` must be an object of names"),
        ("tags", {"user_tag": ["x"]}, "`tags` must be an object of names"),
        ("file_name", 7, "`file_name` must be text, not 7"),
        ("file_name", ["rows.jsonl"], "`file_name` must be text"),
        ("file_name", "a\0b", "which is not there"),
        ("file_name", "a" * 5000, "`file_name`: File name too long"),
        ("formatting", 1, "`formatting` must be text, not 1"),
        ("formatting", {}, "`formatting` must be text, not {}"),
        ("split", 0, "`split` must be text, not 0"),
        ("subset", ["x"], "`subset` must be text"),
        ("ranking", 1, "holds preferences, not answers: to learn the chosen ones, make its file"),
    ],
)
def test_a_value_of_another_type_is_named(info: Path, key: str, value: Any, message: str):
    said = said_of(info, {"mine": GOOD | {key: value}})
    assert f"{info}: mine" in said
    assert message in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", ":1: not JSON: "),
        (b"[1]", ": must be a JSON object"),
        (b"\xff", ": it is not UTF-8 at byte 1"),
        (b'{"mine": ' + b"[" * 100_000, "it is nested too deep"),
        (b'{"mine": ' + b"9" * 5000 + b"}", "it has a number of thousands of digits"),
        ({"mine": [1]}, "has no data set mine"),
        ({"other": {}}, "has no data set mine; set the source's `name` to one of other"),
        ({"mine": {}}, "mine has neither `file_name` nor `hf_hub_url`"),
        ({"mine": {"hf_hub_url": 3}}, "`hf_hub_url` must be text, not 3"),
        ({"mine": {"hf_hub_url": "a/b c"}}, "no such file or folder as a/b c"),
    ],
)
def test_a_file_of_something_else_is_named(info: Path, content: Any, message: str):
    assert message in said_of(info, content)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just("rows.jsonl"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
KEYS = ["columns", "tags", "formatting", "file_name", "split", "subset", "ranking", "num_samples", "images"]
entries = st.dictionaries(st.sampled_from(KEYS), values, max_size=4).map(lambda entry: GOOD | entry) | values


@settings(max_examples=150, deadline=None)
@given(
    content=st.dictionaries(st.sampled_from(["mine", "other"]), entries) | values, name=st.sampled_from(["mine", None])
)
def test_any_entry_is_opened_or_refused(info: Path, content: Any, name: str | None):
    said = said_of(info, content, name)
    assert not said or str(info) in said or str(info.parent) in said


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dataset_dict.json", b"[", "dataset_dict.json:1: not JSON"),
        ("dataset_dict.json", b"[]", "dataset_dict.json: must be a JSON object"),
        ("dataset_dict.json", b"{}", "has no split train; it has none"),
        ("dataset_dict.json", b'{"splits": 3}', "has no split train; it has none"),
        ("dataset_dict.json", b'{"splits": ["test"]}', "has no split train; it has test"),
        ("state.json", b"\xff", "state.json: it is not UTF-8 at byte 1"),
        ("state.json", b"{}", "state.json: _data_files: KeyError"),
        ("state.json", b'{"_data_files": 3}', "state.json: _data_files: TypeError"),
        ("state.json", b'{"_data_files": [{"filename": 3}]}', "state.json: _data_files: TypeError"),
        ("state.json", b'{"_indices_data_files": [1]}', "was saved with indices"),
    ],
)
def test_a_saved_folder_that_is_damaged(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FieldError) as error:
        open_source(str(tmp_path), "data.valid")
    assert error.value.field == "data.valid"
    assert message in str(error.value)
