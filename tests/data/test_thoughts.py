"""Thoughts, calls and the tokens of pictures under a template like Qwen3.5's, from the file to the learned text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer

from bft_megatron.conversations import tokenizers
from bft_megatron.data.prepare import Prepared, prepare
from bft_megatron.errors import UserError
from bft_megatron.recipe.schema import DataSettings
from tests.helpers.material import chat_of, unmarked

SOURCE = unmarked((Path(__file__).parent / "templates" / "qwen35.jinja").read_text())
SEEN = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
PLAIN = chat_of("a", "b")
THOUGHT = [PLAIN[0], PLAIN[1] | {"reasoning_content": "Well."}]
TOOLS = [{"type": "function", "function": {"name": "fly", "parameters": {}}}]
OFF = {"enable_thinking": False}


@pytest.fixture
def model(model_with: Callable[..., Path]) -> Path:
    """A tokenizer with Qwen3.5's tokens of pictures, and with those of thoughts, which are matched in any text."""
    folder = model_with(SOURCE, *SEEN)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(token, special=False) for token in ("<think>", "</think>", "<tool_call>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def prepared(model: Path, *rows: dict[str, Any], **settings: Any) -> Prepared:
    file = model.parent / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare(file, model, DataSettings(str(file), seq_length=1024, **settings), 1, model.parent / "cache")


def learned(result: Prepared, model: Path) -> list[str]:
    decode = tokenizers.load(model).backend.decode
    rows = Dataset.from_file(str(result.folder / "samples.arrow"))
    return [
        decode([t for t, on in zip(row["tokens"], row["learned"], strict=True) if on], skip_special_tokens=False)
        for row in rows
    ]


def test_thoughts_are_learned_and_empty_ones_said(model: Path) -> None:
    result = prepared(
        model,
        {"messages": THOUGHT},
        {"messages": PLAIN},
        {"messages": PLAIN, "chat_template_kwargs": OFF},
        {"messages": THOUGHT, "chat_template_kwargs": OFF},
    )
    assert learned(result, model) == [
        "Well.\n</think>\n\nb<|im_end|>",
        "\n</think>\n\nb<|im_end|>",
        "b<|im_end|>",
        "Well.\n</think>\n\nb<|im_end|>",
    ]
    empty = "the chat template writes an empty thought before answers without thoughts, and it is learned"
    prompt = "the generation prompt of the chat template ends in '\\n</think>\\n\\n', which it does not write"
    notes = result.counts.notes
    assert [n for note, n in notes.items() if note.startswith(empty)] == [1]
    assert [
        (n, "leave enable_thinking: false out" in note) for note, n in notes.items() if note.startswith(prompt)
    ] == [(1, True)]
    assert sum(notes.values()) == 2


def test_earlier_thoughts_are_dropped_or_kept(model: Path) -> None:
    talk = {"messages": [*THOUGHT, *THOUGHT]}
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .*data\.turns: split.* \{preserve_thinking: true\} to keep"):
        prepared(model, talk)
    one = "Well.\n</think>\n\nb<|im_end|>"
    assert learned(prepared(model, talk, turns="split"), model) == [one, one]
    assert learned(prepared(model, talk, supervise="last"), model) == [one]
    assert learned(prepared(model, talk, chat_template_kwargs={"preserve_thinking": True}), model) == [one + one]


def test_the_steps_of_an_answer_are_learned_in_one_sample(model: Path) -> None:
    """With every argument, a null too; what the tools say is not learned."""
    calls = [{"function": {"name": "fly", "arguments": {"to": "Oslo", "back": None, "by": ["bus", None]}}}]
    step = {"role": "assistant", "content": None, "reasoning_content": "Well.", "tool_calls": calls}
    as_text = [{"function": {"name": "fly", "arguments": json.dumps(calls[0]["function"]["arguments"])}}]
    answer = {"role": "tool", "content": "There."}
    talk = [PLAIN[0], step, answer, step | {"tool_calls": as_text}, answer, PLAIN[1]]
    result = prepared(model, {"messages": talk, "tools": TOOLS})
    call = (
        "<tool_call>\n<function=fly>\n<parameter=to>\nOslo\n</parameter>\n<parameter=back>\nNone\n</parameter>\n"
        '<parameter=by>\n["bus", null]\n</parameter>\n</function>\n</tool_call><|im_end|>'
    )
    first = f"Well.\n</think>\n\n{call}"
    assert learned(result, model) == [f"{first}{first}\n</think>\n\nb<|im_end|>"]
    assert [n for note, n in result.counts.notes.items() if "is given as objects" in note] == [1]


def test_an_answer_before_any_question(model: Path) -> None:
    """The template refuses the beginning that shows its place, though not the whole."""
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .*as far as messages\[0\].* with loss: false"):
        prepared(model, {"messages": [PLAIN[1], *PLAIN]})
    masked = [PLAIN[1] | {"loss": False}, *PLAIN]
    assert learned(prepared(model, {"messages": masked}), model) == ["\n</think>\n\nb<|im_end|>"]


def test_tokens_of_pictures_in_a_text_stay_text(model: Path) -> None:
    text = "".join(SEEN)
    result = prepared(model, {"messages": chat_of(text, f"{text}<think>"), "chat_template_kwargs": OFF})
    (row,) = Dataset.from_file(str(result.folder / "samples.arrow"))
    known = tokenizers.load(model).backend
    assert not {known.token_to_id(token) for token in SEEN} & {*row["tokens"]}
    assert known.decode(row["tokens"]).count(text) == 2
    assert sum(note.endswith("name it in data.special_tokens") for note in result.counts.notes) == len(SEEN)
