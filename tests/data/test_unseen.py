"""What a text model cannot see, and answers that are not to be learned: refused by `prepare` with the column named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from bft_megatron.errors import UserError
from bft_megatron.reading import sources
from bft_megatron.recipe.sources import SourceSettings
from tests.helpers.commands import ROOT, run_command
from tests.helpers.material import chat_of

CHAT = {"messages": chat_of("a", "b")}
TALK = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
PAIR = {"prompt": "a", "completion": "b"}
ALPACA = {"instruction": "a", "output": "b"}
ASKED = {"conversations": [{"from": "human", "value": "a"}]}
SAID = {"from": "gpt", "value": "b"}


def shown(part: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}, CHAT["messages"][1]]}


def with_message(**fields: Any) -> dict[str, Any]:
    return {"messages": [CHAT["messages"][0] | fields, CHAT["messages"][1]]}


PREFERENCE = "a preference, `chosen` over `rejected`"
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (CHAT | {"images": ["a.png"]}, "images", "holds an image, which a text model cannot see"),
    (TALK | {"image": "a.png"}, "image", "holds an image"),
    (PAIR | {"image": {"bytes": "iVBO", "path": None}}, "image", "holds an image"),
    (PAIR | {"image_url": "https://example.org/a.png"}, "image_url", "holds an image"),
    (CHAT | {"image_1": "a.png", "image_2": None}, "image_1", "holds an image"),
    (CHAT | {"videos": [["a.mp4"]]}, "videos", "holds a video"),
    (ALPACA | {"video": "a.mp4"}, "video", "holds a video"),
    (TALK | {"audios": ["a.wav"]}, "audios", "holds audio"),
    (CHAT | {"audio": {"array": [0.5], "sampling_rate": 8000}}, "audio", "holds audio"),
    (with_message(content="<image>a") | {"images": []}, "images", "is empty, and <image> in the text stands for an"),
    (PAIR | {"prompt": "<video> a", "video": None}, "video", "is empty, and <video> in the text stands for a video"),
    (PAIR | {"prompt": "<|audio_1|>a", "audio": ""}, "audio", "<|audio_1|> in the text stands for audio"),
    (with_message(images=["a.png"]), "messages[0]: images", "holds an image"),
    (
        shown({"type": "image_url", "image_url": {"url": "https://example.org"}}),
        "messages[0].content[1]",
        "a part of the type image_url, which a text model cannot see: take it out of the message",
    ),
    (shown({"type": "input_audio", "input_audio": {}}), "messages[0].content[1]", "of the type input_audio, which"),
    (shown({"image": "a.png"}), "messages[0].content[1]", "of the type image, which"),
    (CHAT | {"label": False}, "label", "false marks an answer that is not to be learned (KTO)"),
    (PAIR | {"label": False}, "label", "false marks an answer that is not to be learned (KTO)"),
    (TALK | {"kto_tag": False}, "kto_tag", "false marks an answer that is not to be learned (KTO)"),
    (ALPACA | {"kto_tag": 0}, "kto_tag", "false marks an answer that is not to be learned (KTO)"),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "chosen",
        f"{PREFERENCE}: a fine-tune learns answers, not preferences; to learn the chosen ones, set the source's "
        "`columns: {response: chosen}`, or leave such rows out with data.on_error: skip",
    ),
    (ALPACA | {"chosen": "b", "rejected": "c"}, "chosen", "`columns: {response: chosen}`"),
    ({"chosen": chat_of("a", "b"), "rejected": chat_of("a", "c")}, "chosen", "`columns: {messages: chosen}`"),
    (
        {"prompt": "a", "chosen": chat_of("a", "b"), "rejected": chat_of("a", "c")} | CHAT,
        "chosen",
        "`columns: {messages: chosen}`",
    ),
    (
        ASKED | {"chosen": SAID, "rejected": {"from": "gpt", "value": "c"}},
        "chosen",
        "`columns: {prompt: conversations, response: chosen}`",
    ),
    (PAIR | {"chosen": chat_of("a", "b")[1:], "rejected": "c"}, "chosen", "`columns: {response: chosen}`"),
    ({"chosen": "Human: a Assistant: b", "rejected": "c"}, "chosen", "write the chosen ones to a file as messages"),
    (CHAT | {"chosen": "b", "rejected": "c"}, "chosen", "`columns: {messages: messages}`"),
]


def prepared(folder: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], *words: str) -> int:
    """The status of `prepare` on a file of these rows."""
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {ROOT}/recipes/tiny\ninit: random\ndata: {{train: {folder}/rows.jsonl, seq_length: 128}}\n"
        f"train: {{iterations: 1}}\noutput: {folder}/out\n"
    )
    return run_command(monkeypatch, "prepare", recipe, *words)


@pytest.mark.parametrize(("row", "field", "said"), REFUSED, ids=range(len(REFUSED)))
def test_prepare_names_the_column_and_what_to_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    row: dict[str, Any],
    field: str,
    said: str,
) -> None:
    assert prepared(tmp_path, monkeypatch, [CHAT, row]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/rows.jsonl:2: {field}: ")
    assert said in line


def test_prepare_leaves_them_out_and_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = [CHAT, PAIR | {"label": True}, TALK]
    rows = [row for row, _, _ in REFUSED]
    assert prepared(tmp_path, monkeypatch, [*good, *rows], "data.on_error=skip") == 0
    (listed,) = (tmp_path / "out").rglob("refused.txt")
    fields = [line.split(": ")[1] for line in listed.read_text().splitlines()]
    assert fields == [field.split(": ")[0] for _, field, _ in REFUSED]


LEARNED: list[tuple[dict[str, Any], dict[str, str]]] = [
    (CHAT | {"images": [], "image": None, "video": "", "audios": [None], "image_path": [""], "image_2": 0}, {}),
    (CHAT | {"image": {"bytes": None, "path": None}, "audio": {}}, {}),
    (CHAT | {"imagery": "x", "video_title": "x", "audience": ["x"]}, {}),
    (CHAT | {"label": "sports"}, {}),
    (PAIR | {"label": 0}, {}),
    (PAIR | {"label": True, "kto_tag": True}, {}),
    (CHAT | {"chosen": "x"}, {}),
    (CHAT | {"chosen": 0.9, "rejected": 0.1}, {}),
    (CHAT | {"chosen": [], "rejected": None}, {}),
    ({"image": "a", "video": "b"}, {"prompt": "image", "response": "video"}),
    ({"prompt": "a", "label": "b"}, {"response": "label"}),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"response": "chosen"}),
    ({"prompt": chat_of("a"), "chosen": chat_of("a", "b")[1:], "rejected": []}, {"response": "chosen"}),
    ({"chosen": chat_of("a", "b"), "rejected": chat_of("a", "c")}, {"messages": "chosen"}),
    (CHAT | {"chosen": chat_of("a", "b"), "rejected": chat_of("a", "c")}, {"messages": "messages"}),
    (ASKED | {"chosen": SAID, "rejected": SAID}, {"prompt": "conversations", "response": "chosen"}),
    (ASKED | {"chosen": [SAID], "rejected": [SAID]}, {"prompt": "conversations", "response": "chosen"}),
    (CHAT | {"image": float("nan"), "images": "[]", "audio": "None"}, {}),
    (CHAT | {"chosen": "b", "rejected": "c"}, {"messages": "messages"}),
]


@pytest.mark.parametrize(("row", "columns"), LEARNED, ids=range(len(LEARNED)))
def test_what_only_looks_like_it_is_learned(tmp_path: Path, row: dict[str, Any], columns: dict[str, str]) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (found,) = sources.read(SourceSettings(str(tmp_path / "rows.jsonl"), columns=columns))
    assert found.messages == chat_of("a", "b")


def test_an_element_of_svg_is_text(tmp_path: Path) -> None:
    chat = chat_of("draw", "<svg><image href='x'/><image></svg>")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": chat}))
    assert next(sources.read(tmp_path / "rows.jsonl")).messages == chat


def test_the_images_and_placeholders_of_a_table_too(tmp_path: Path) -> None:
    rows = [PAIR | {"image": None}, PAIR | {"prompt": "<image>", "image": None}, PAIR | {"image": {"bytes": b"\x89"}}]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    source = sources.open_source(tmp_path / "rows.parquet")
    found = [found for chunk in source.chunks() for found in source.convert(chunk)]
    assert [isinstance(error, UserError) for error in found] == [False, True, True]
    assert "row 2: image: is empty, and <image> in the text" in str(found[1])
    assert "row 3: image: holds an image" in str(found[2])


def test_a_false_label_of_csv_is_text_and_means_the_same(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion,label\na,b,True\na,b,False\n")
    with pytest.raises(UserError, match=r"rows\.csv:3: label: false marks an answer that is not to be learned"):
        sources.check(tmp_path / "rows.csv")
