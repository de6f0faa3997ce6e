"""Reading conversations: what is accepted, and that every fault is named by file, line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bft_megatron.errors import FieldError, UserError
from bft_megatron.reading import sources

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return path


def test_reads_in_order_and_skips_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), b"", b"  ", GOOD | {"weight": 2})
    first, second = sources.read(path)
    assert (first.line, first.messages, first.weight) == (1, GOOD["messages"], 1.0)
    assert (second.line, second.weight) == (4, 2.0)
    assert sources.check(path) == 2


def test_keeps_a_messages_other_fields_for_the_template(tmp_path: Path) -> None:
    messages = [{"role": "tool", "content": "", "name": "search"}, {"role": "assistant", "content": "é\u2028x"}]
    path = write(tmp_path, {"messages": messages})
    assert next(sources.read(path)).messages == messages


def with_message(**message: Any) -> dict[str, Any]:
    return {"messages": [*GOOD["messages"], message]}


FAULTS: list[tuple[Any, str, str]] = [
    (b"{not json", "", "not JSON"),
    (b"[1, 2]", "", "must be an object"),
    (b'"text"', "", "must be an object"),
    (b'{"messages": "\xff"}', "", "not UTF-8 at byte 15"),
    (b"[" * 100_000, "", "not JSON that can be read"),
    (b'{"messages": ' + b"9" * 5000 + b"}", "", "not JSON that can be read"),
    ({"text": "Hi"}, ": messages", "this one has 'text'"),
    ({"conversations": []}, ": conversations", "at least one message"),
    ({"conversations": [{"from": "nobody", "value": "x"}]}, ": conversations[0].from", 'not "nobody"'),
    ({"conversations": [{"from": "function_call", "value": "f("}]}, ": conversations[0].value", "a call as JSON"),
    ({"instruction": "Hi", "output": ""}, ": output", "must not be empty"),
    ({"instruction": "Hi", "output": "x", "history": [["a"]]}, ": history[0]", "must be a pair"),
    ({"instruction": "Hi", "output": ["x", "y"]}, ": output", "of several texts to choose from, write one"),
    ({"prompt": "Hi", "completion": None}, ": messages", "no such field"),
    (GOOD | {"tools": "{"}, ": tools", "must be a JSON list"),
    (GOOD | {"chat_template_kwargs": []}, ": chat_template_kwargs", "must be a JSON object"),
    ({"messages": []}, ": messages", "at least one message"),
    ({"messages": {"role": "user"}}, ": messages", "at least one message"),
    ({"messages": ["Hi"]}, ": messages[0]", "must be an object"),
    ({"messages": [{"role": "user", "content": "Hi"}]}, ": messages", "no message is the assistant's"),
    (with_message(role="gpt", content="x"), ": messages[2].role", 'not "gpt"'),
    (with_message(role=["user"], content="x"), ": messages[2].role", "must be one of"),
    (with_message(content="x"), ": messages[2].role", "not null"),
    (with_message(role="assistant", content=""), ": messages[2].content", "must not be empty"),
    (with_message(role="assistant", content=" \n"), ": messages[2].content", "must not be empty"),
    (with_message(role="user", content=None), ": messages[2].content", "must be text, not null"),
    (with_message(role="user", content=3), ": messages[2].content", "must be text, not 3"),
    (with_message(role="user", content="a\ud800"), ": messages[2].content", "surrogate pair at character 2"),
    (with_message(role="assistant", content="x", weight=0.5), ": messages[2].weight", "must be 0 or 1"),
    (with_message(role="assistant", content="x", loss=0), ": messages[2].loss", "must be true or false"),
    (
        with_message(role="user", content=[{"type": "image_url"}]),
        ": messages[2].content[0]",
        "of the type image_url, which a text model cannot see",
    ),
    (with_message(role="assistant", tool_calls="x"), ": messages[2].tool_calls", "must be a list of calls"),
    (with_message(role="assistant", tool_calls=[{"function": {}}]), ": messages[2].tool_calls[0]", '"name"'),
    (GOOD | {"weight": "two"}, ": weight", "must be a number"),
    (GOOD | {"weight": True}, ": weight", "must be a number"),
    (GOOD | {"weight": -1}, ": weight", "must be at least 0 and at most 1,000,000, not -1.0"),
    (GOOD | {"weight": float("nan")}, ": weight", "must be finite and at least 0"),
    (GOOD | {"weight": 10**400}, ": weight", "must be finite"),
    (GOOD | {"weight": 1e30}, ": weight", "at most 1,000,000, not 1e+30"),
    (GOOD | {"weight": "nan"}, ": weight", "must be finite"),
    (GOOD | {"weight": "inf"}, ": weight", "must be finite"),
    (GOOD | {"weight": "1e400"}, ": weight", "must be finite"),
    (GOOD | {"weight": "9" * 400}, ": weight", "must be finite"),
]


@pytest.mark.parametrize(("row", "field", "message"), FAULTS, ids=range(len(FAULTS)))
def test_a_fault_is_named_by_file_line_and_field(tmp_path: Path, row: Any, field: str, message: str) -> None:
    path = write(tmp_path, GOOD, row, GOOD)
    with pytest.raises(UserError) as error:
        sources.check(path)
    assert str(error.value).startswith(f"{path}:2{field}: ")
    assert message in str(error.value)


def test_a_missing_file_names_the_recipes_field(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="No such file") as error:
        sources.check(tmp_path / "none.jsonl", "data.valid")
    assert error.value.field == "data.valid"


BYTES = {
    "rows.jsonl.xz": b"\xfd7zXZ\0\0",
    "rows.feather": b"ARROW1\0\0",
    "rows.xlsx": b"PK\3\4\0",
    "rows.txt": b"\xff\xfeh\0",
}


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("pattern", [False, True], ids=["path", "pattern"])
def test_a_file_that_is_no_text_is_refused_with_what_is_read(tmp_path: Path, name: str, pattern: bool) -> None:
    (tmp_path / name).write_bytes(BYTES[name])
    with pytest.raises(FieldError) as error:
        sources.check(tmp_path / "ro*" if pattern else tmp_path / name)
    assert str(error.value).startswith(f"data.train: {tmp_path / name} holds no text of UTF-8: reads .jsonl, ")
    assert ".parquet, .arrow, also with .gz, .zst, .bz2" in str(error.value)


def test_another_suffix_is_that_of_lines(tmp_path: Path) -> None:
    """A character may lie across the edge of what is looked at."""
    row = {"messages": [{"role": "user", "content": "é" * 5000}, GOOD["messages"][1]]}
    (tmp_path / "rows.txt").write_text(json.dumps(row, ensure_ascii=False))
    assert sources.check(tmp_path / "rows.txt") == 1


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="holds no conversation"):
        sources.check(path)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))
messages = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "assistant", "x"]) | trees, "content": st.text() | trees}
)
columns = ("weight", "image", "label", "chosen", "rejected", "tools", "functions", "prompt", "completion")
rows = st.fixed_dictionaries(
    {}, optional={"messages": st.lists(messages, max_size=3) | trees} | dict.fromkeys(columns, trees)
)


@given(st.binary(max_size=60) | (trees | rows).map(lambda row: json.dumps(row).encode()))
def test_any_line_is_read_or_refused_by_its_number(tmp_path_factory: pytest.TempPathFactory, line: bytes) -> None:
    path = write(tmp_path_factory.mktemp("fuzz"), GOOD, line)
    read, refused = [], ""
    try:
        read = list(sources.read(path))
    except UserError as error:
        refused = str(error)
    assert bool(read) != refused.startswith(f"{path}:")
    for conversation in read:
        assert {"role", "content"} <= conversation.messages[0].keys()
        assert conversation.weight >= 0
