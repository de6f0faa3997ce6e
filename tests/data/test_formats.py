"""Formats and kinds of files: the same conversation, however it is written down."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from datasets import Dataset, DatasetDict

from bft_megatron.conversations import roles
from bft_megatron.errors import FieldError, UserError
from bft_megatron.reading import json_lists, readers, sources
from bft_megatron.reading.formats import Conversation
from bft_megatron.recipe.sources import SourceSettings, source_settings

PLAIN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SYSTEM = {"role": "system", "content": "Be kind."}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": 1}}}]
CALLING = {"role": "assistant", "content": None}
CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]

PARTS = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
TALK = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]

FORMATS: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    ({"messages": PLAIN}, PLAIN),
    ({"messages": json.dumps(PLAIN)}, PLAIN),
    ({"messages": [{"role": "user", "content": PARTS}, PLAIN[1]]}, PLAIN),
    ({"messages": [PLAIN[0] | {"name": None}, PLAIN[1]]}, PLAIN),
    ({"conversations": PLAIN}, PLAIN),
    ({"conversations": TALK}, PLAIN),
    ({"conversations": TALK, "system": "Be kind."}, [SYSTEM, *PLAIN]),
    ({"instruction": "Hi", "output": "Hello"}, PLAIN),
    ({"instruction": "Hi", "input": "", "output": "Hello", "system": "", "history": []}, PLAIN),
    ({"instruction": "Hi", "input": "you", "output": "Hello"}, [{"role": "user", "content": "Hi\nyou"}, PLAIN[1]]),
    ({"instruction": "Hi", "output": "Hello", "history": [["Hi", "Hello"]]}, [*PLAIN, *PLAIN]),
    ({"prompt": "Hi", "completion": "Hello"}, PLAIN),
    ({"prompt": [SYSTEM, PLAIN[0]], "completion": [PLAIN[1]]}, [SYSTEM, *PLAIN]),
]


def read(path: Path, **settings: Any) -> list[Conversation]:
    return list(sources.read(SourceSettings(str(path), **settings)))


def jsonl(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("row", "messages"), FORMATS, ids=range(len(FORMATS)))
def test_a_format_is_recognised(tmp_path: Path, row: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    (found,) = read(jsonl(tmp_path, row))
    assert found == Conversation(1, messages, 1.0)


def test_an_empty_system_message_stays(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": ""}, *PLAIN]
    assert read(jsonl(tmp_path, {"messages": messages, "system": "other"}))[0].messages == messages


def test_columns_and_roles_by_name(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"question": "Hi", "answer": "Hello", "score": 2})
    with pytest.raises(UserError, match="this one has 'question', 'answer', 'score': name them"):
        read(path)
    columns = {"prompt": "question", "response": "answer", "weight": "score"}
    assert read(path, columns=columns) == [Conversation(1, PLAIN, 2.0)]
    assert read(path, columns=columns, format="pairs") == [Conversation(1, PLAIN, 2.0)]
    talk = [{"who": "person", "text": "Hi"}, {"who": "machine", "text": "Hello"}]
    path = jsonl(tmp_path, {"talk": talk})
    columns = {"messages": "talk", "role": "who", "content": "text"}
    assert read(path, columns=columns, roles={"person": "user", "machine": "assistant"})[0].messages == PLAIN


def test_tools_and_calls(tmp_path: Path) -> None:
    """OpenAI's arguments are JSON as text, and stay it; ShareGPT's calls a turn of their own."""
    text = [{"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
    answer = {"role": "tool", "content": "2"}
    rows = [
        {"messages": [PLAIN[0], {"role": "assistant", "content": None, "tool_calls": text}, answer], "tools": TOOLS},
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "2"},
            ],
            "tools": json.dumps(TOOLS),
        },
    ]
    openai, sharegpt = read(jsonl(tmp_path, *rows))
    assert openai.messages == [PLAIN[0], CALLING | {"tool_calls": text}, answer]
    assert sharegpt.messages == [PLAIN[0], CALLING | {"tool_calls": CALLS}, answer]
    assert openai.tools == sharegpt.tools == TOOLS


def test_calls_and_tools_as_openai_wrote_them_first(tmp_path: Path) -> None:
    """`function_call`, the role `function` and `functions`, as text in a table's cell too."""
    function = TOOLS[0]["function"]
    call = {"name": "add", "arguments": '{"a": 1}'}
    talk = [PLAIN[0], CALLING | {"function_call": call}, {"role": "function", "name": "add", "content": "2"}, PLAIN[1]]
    plain = [message | {"function_call": None} for message in PLAIN]
    rows = [
        {"messages": talk, "functions": [function]},
        {"messages": json.dumps(talk), "functions": json.dumps([function])},
        {"messages": talk, "tools": [function]},
        {"messages": [PLAIN[0], CALLING | {"function_call": json.dumps(call)}, *talk[2:]], "tools": TOOLS},
        {"messages": plain, "functions": "def add(a): ..."},
        {"messages": plain, "functions": [{"name": "add"}, "x"]},
    ]
    *old, text, names = read(jsonl(tmp_path, *rows))
    for found in old:
        assert found.messages == [
            PLAIN[0],
            CALLING | {"tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "name": "add", "content": "2"},
            PLAIN[1],
        ]
        assert found.tools == TOOLS
    assert text == Conversation(5, PLAIN, 1.0)
    assert names == Conversation(6, PLAIN, 1.0)
    for wrong in ({"arguments": "{}"}, "add", [call]):
        with pytest.raises(UserError, match=r"messages\[0\]\.function_call(\[0\])?: must be"):
            read(jsonl(tmp_path, {"messages": [CALLING | {"function_call": wrong}]}))


def test_a_developer_instructs_as_a_system_does(tmp_path: Path) -> None:
    developer = {"role": "developer", "content": "Be kind."}
    rows = [
        {"messages": [developer, *PLAIN], "system": "other"},
        {"conversations": [{"from": "developer", "value": "Be kind."}, *TALK], "system": "other"},
        {"prompt": [developer, PLAIN[0]], "completion": "Hello"},
    ]
    for found in read(jsonl(tmp_path, *rows)):
        assert found.messages == [developer, *PLAIN]
        assert roles.known_to("{{ messages[0].role }}", found.messages) == [SYSTEM, *PLAIN]
        assert roles.known_to("{% if m.role == 'developer' %}", found.messages) == [developer, *PLAIN]


def test_a_message_may_be_masked_and_a_row_have_variables(tmp_path: Path) -> None:
    masked = [
        PLAIN[0],
        {"role": "assistant", "content": "", "weight": 0},
        PLAIN[0],
        {"role": "assistant", "content": "x", "loss": False},
        PLAIN[0],
        {"role": "assistant", "content": "y", "weight": 1, "loss": True},
    ]
    (found,) = read(jsonl(tmp_path, {"messages": masked, "chat_template_kwargs": {"enable_thinking": False}}))
    assert found.masked == {1, 3}
    assert found.template == {"enable_thinking": False}
    assert all(message.keys() == {"role", "content"} for message in found.messages)


ROWS = [{"instruction": f"é {i}", "output": f'a,\n"{i}"', "weight": float(i)} for i in range(300)]
WANTED = [
    ([{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}], row["weight"])
    for row in ROWS
]


def _write(kind: str, folder: Path) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "json":
        path.write_text(json.dumps(ROWS, indent=1, ensure_ascii=False), encoding="utf-8-sig")
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    elif kind == "folder":
        Dataset.from_list(ROWS).save_to_disk(path, num_shards=2)
    elif kind == "splits":
        DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}).save_to_disk(path)
    elif kind == "glob":
        for i in range(3):
            jsonl(folder, *ROWS[100 * i : 100 * (i + 1)], name=f"part-{i}.jsonl")
        path = folder / "part-*.jsonl"
    else:
        jsonl(folder, *ROWS, name="rows.json")
        path = folder / "rows.json"
    return path


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "folder", "splits", "glob", "jsonl named json"])
def test_a_kind_of_file_gives_the_same_conversations(tmp_path: Path, kind: str) -> None:
    path = _write(kind, tmp_path)
    found = read(path)
    assert [(c.messages, c.weight) for c in found] == WANTED
    if kind == "json":  # each row a brace's line, two fields of text, the weight, a brace
        assert [c.line for c in found[:2]] == [2, 7]
    if kind == "csv":  # the names, then two lines a row
        assert [c.line for c in found[:2]] == [2, 4]
    if kind == "glob":
        assert [(c.file, c.line) for c in found] == [(i // 100, i % 100 + 1) for i in range(300)]
    if kind == "splits":
        assert len(read(path, split="test")) == 1
        with pytest.raises(FieldError, match="no split nothing; it has train, test"):
            read(path, split="nothing")


@pytest.mark.parametrize("block", [1, 2, 7, 64])
def test_json_is_read_across_the_edges_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Numbers too, which may go on in the next block."""
    monkeypatch.setattr(json_lists, "BLOCK", block)
    values = [12345, {"a": [1.5e10, "é]},\n"]}, -17, None, "x", [[]]]
    (tmp_path / "values.json").write_text(" \n" + json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    (chunk,) = readers.read_json(str(tmp_path / "values.json"), 0, 1 << 20)
    assert [(number, value) for number, _, value in chunk] == list(zip([3, 4, 10, 11, 12, 13], values, strict=True))


def test_parquet_that_unifies_messages_gives_them_without_nulls(tmp_path: Path) -> None:
    rows = [{"messages": PLAIN}, {"messages": [PLAIN[0], {"role": "assistant", "content": None, "tool_calls": CALLS}]}]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    first, second = read(tmp_path / "rows.parquet")
    assert first.messages == PLAIN
    assert second.messages[1]["tool_calls"] == CALLS


BROKEN: list[tuple[str, bytes, str]] = [
    ("json", b"[\n{}\n{}]", ":3: not JSON: a comma"),
    ("json", b'[\n{"a": 1},\n\n{"b": ]', ":4: not JSON"),
    ("json", b'[\n{"instruction": "x", "output": "y"},\n', ":3: not JSON"),
    ("json", b'[\n{"instruction": "\xff"}]', ":1: not UTF-8"),
    ("json", b'[\n{"instruction": "x", "output": 1}]', ":2: output: must be text"),
    ("csv", b"instruction,output\nx,y\nx,\xff\n", ":3: not UTF-8"),
    ("csv", b"instruction,output\nx,y\nx\n", ":3: must have 2 cells"),
    ("csv", b'instruction,output\nx,"y', ":2: not CSV"),
    ("csv", b"instruction,output,weight\nx,y,nan\n", ":2: weight: must be finite"),
    ("csv", b"instruction,output,weight\nx,y,1\nx,y,1e400\n", ":3: weight: must be finite"),
    ("csv", b"instruction,output,weight\nx,y,1e7\n", ":2: weight: must be at least 0 and at most 1,000,000"),
    ("json", b'[{"instruction": "x", "output": "y", "weight": Infinity}]', ":1: weight: must be finite"),
    ("parquet", b"PAR1 and no more", ": not Parquet"),
]


@pytest.mark.parametrize(("kind", "content", "said"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_is_refused_at_its_line(tmp_path: Path, kind: str, content: bytes, said: str) -> None:
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}{said}")


def test_a_fault_in_a_table_names_its_row(tmp_path: Path) -> None:
    Dataset.from_list([{"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}]).to_parquet(
        tmp_path / "rows.parquet"
    )
    with pytest.raises(UserError, match=r"rows\.parquet: row 2: output: an assistant's message must not be empty"):
        read(tmp_path / "rows.parquet")


def test_a_hub_data_set_is_read_from_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "datasets--org--chats"
    snapshot = folder / "snapshots" / ("0" * 40) / "data"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    Dataset.from_list(ROWS[:3]).to_parquet(snapshot / "train-00000-of-00001.parquet")
    Dataset.from_list(ROWS[3:4]).to_parquet(snapshot / "test-00000-of-00001.parquet")
    assert [(c.messages, c.weight) for c in read(Path("org/chats"))] == WANTED[:3]
    assert [(c.messages, c.weight) for c in read(Path("org/chats"), split="test")] == WANTED[3:4]
    with pytest.raises(FieldError, match="hf download --repo-type dataset org/others"):
        read(Path("org/others"))


INFO = {
    "plain": {"file_name": "alpaca.json"},
    "named": {"file_name": "named.jsonl", "columns": {"prompt": "q", "response": "a", "history": "h"}},
    "chats": {
        "file_name": "chats.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "system": "sys"},
        "tags": {"role_tag": "role", "content_tag": "text", "user_tag": "me", "assistant_tag": "bot"},
    },
    "liked": {"file_name": "alpaca.json", "ranking": True, "columns": {"chosen": "c", "rejected": "r"}},
    "gone": {"file_name": "gone.json"},
}


def test_llamafactorys_dataset_info_is_read_as_it_is(tmp_path: Path) -> None:
    info = tmp_path / "dataset_info.json"
    info.write_text(json.dumps(INFO))
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": "Hi", "input": "", "output": "Hello"}]))
    jsonl(tmp_path, {"q": "Hi", "a": "Hello", "h": [["Hi", "Hello"]]}, name="named.jsonl")
    talk = [{"role": "me", "text": "Hi"}, {"role": "bot", "text": "Hello"}]
    jsonl(tmp_path, {"messages": talk, "sys": "Be kind."}, name="chats.jsonl")
    assert read(info, name="plain")[0].messages == PLAIN
    assert read(info, name="named")[0].messages == [*PLAIN, *PLAIN]
    assert read(info, name="chats")[0].messages == [SYSTEM, *PLAIN]
    for name, said in [
        ("liked", "preferences"),
        ("gone", "not there"),
        ("other", "plain, named, chats"),
        (None, "set"),
    ]:
        with pytest.raises(FieldError, match=said):
            read(info, name=name)


def test_a_recipes_sources() -> None:
    assert source_settings("a/b.jsonl", "data.train") == (SourceSettings("a/b.jsonl"),)
    first, second = source_settings(["a.jsonl", {"path": "b.jsonl", "weight": 2, "name": "c"}], "data.train")
    assert (first.label, first.weight, second.label, second.weight) == ("a", 1.0, "c", 2.0)


WRONG: list[tuple[Any, str]] = [
    ([], "at least one source"),
    ([3], "must be a path or fields"),
    ([{"weight": 1}], "`path`: must be given"),
    ([{"path": "a", "weigth": 1}], "did you mean `weight`"),
    ([{"path": "a", "weight": 0}], "`weight`: must be above 0 and at most"),
    (["b", {"path": "a", "weight": float("inf")}], r"`\[1\].weight`: must be finite and above 0"),
    ([{"path": "a", "format": "chat"}], "`format`: must be one of auto, messages"),
    ([{"path": "a", "columns": {"question": "q"}}], "question is none of messages, role"),
    ([{"path": "a", "columns": ["q"]}], "must be names such as"),
    (["a.jsonl", "b/a.jsonl"], "two sources are called a"),
]


@pytest.mark.parametrize(("value", "said"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_with_a_recipes_sources(value: Any, said: str) -> None:
    with pytest.raises(FieldError, match=said):
        source_settings(value, "data.train")


def test_a_validation_has_no_weights() -> None:
    with pytest.raises(FieldError, match="a validation reads every source once"):
        source_settings([{"path": "a", "weight": 2}], "data.valid")
    with pytest.raises(FieldError, match="valid is what the reports call the whole set"):
        source_settings(["a.jsonl", "b/valid.jsonl"], "data.valid")
