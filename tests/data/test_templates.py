"""Masks on templates like those of well-known models, held to transformers' own: turns, tools, thoughts, edges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from bft_megatron.conversations import chat, tokenizers
from bft_megatron.conversations.chat_tokenizer import ChatTokenizer
from bft_megatron.errors import UserError
from bft_megatron.reading.formats import Conversation
from tests.helpers.material import chat_of, unmarked

FOLDER = Path(__file__).parent / "templates"
CONTROL = {
    "llama31": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen25": [],
    "qwen3": [],
    "qwen35": [],
    "mistral": [
        *("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ],
    "smollm2": [],
}
EDGES = {"llama31": ("<|begin_of_text|>", "<|eot_id|>"), "mistral": ("<s>", "</s>")}

TOOLS = [{"type": "function", "function": {"name": "add", "description": "é", "parameters": {"a": {"type": "int"}}}}]


def call(*arguments: dict[str, Any], content: str = "") -> dict[str, Any]:
    calls = [
        {"id": f"call0000{i}", "type": "function", "function": {"name": "add", "arguments": a}}
        for i, a in enumerate(arguments)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def result(content: str, i: int = 0) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": f"call0000{i}", "name": "add"}


LONG = chat_of("a", "Hello there!", "b c", "  f 🙂🙂\n", "c\n", "\n\nc  d", system="You are Bob.")
TALKS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "turns": (LONG, None),
    "no system": (LONG[1:], None),
    "empty system": ([LONG[0] | {"content": ""}, *LONG[1:]], None),
    "calls": ([*chat_of("a", "b", "c"), call({"a": [1, "é"]}), result("2"), *chat_of("", "two")[1:]], TOOLS),
    "names": ([LONG[1] | {"name": "Ann"}, LONG[2] | {"name": "Bot"}], None),
    "ends with a call": ([*chat_of("a"), call({"a": 1})], TOOLS),
    "tools unused": (LONG, TOOLS),
}
STEPS = [
    *(*LONG[:2], call({"a": [1]}, {"a": 2}, content="So") | {"reasoning_content": "First."}),
    *(result("2"), result("3", 1), call({"a": 3}) | {"reasoning_content": "Then."}, result("4"), LONG[2]),
]
"""One question, whose answer takes three steps, the last without a thought."""

MORE = {  # what not every template takes
    "qwen25": {
        "two calls": ([*chat_of("a"), call({"a": 1}, {}, content="So"), result("2"), result("3", 1), LONG[2]], TOOLS),
        "opens itself": ([LONG[2], *LONG[1:]], None),
    },
    "qwen3": {"thoughts": ([*chat_of("a"), LONG[2] | {"reasoning_content": "Well."}], None)},
    "qwen35": {
        "thoughts": ([*chat_of("a"), LONG[2] | {"reasoning_content": " Well.\n\nSo? "}], None),
        "thoughts in the content": (chat_of("a", "<think>\nWell.\n</think>\n\nb"), None),
        "steps": (STEPS, TOOLS),
        "a null": ([*chat_of("a"), call({"a": None, "b": True, "c": {"d": None}, "e": "é\n", "f": 1.5})], TOOLS),
        "no arguments": ([*chat_of("a"), call({}, {}, content="So")], TOOLS),
    },
}
CASES = [
    (t, n, *talk) for t in CONTROL for n, talk in {**TALKS, **MORE.get(t, {})}.items() if t != "smollm2" or not talk[1]
]
THINKING = ("qwen3", "qwen35")
REWRITTEN = {
    (template, name)
    for template in THINKING
    for name in ("turns", "no system", "empty system", "calls", "tools unused")
}
"""Conversations whose earlier answers are written without the thought, empty or not, that they had as the last one."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, ChatTokenizer, ChatTokenizer]]:
    """Of each template: transformers' tokenizer, ours, and ours without the template's markers."""
    return {}


@pytest.fixture
def model(
    models: dict[str, Any], model_with: Callable[..., Path], template: str
) -> tuple[Any, ChatTokenizer, ChatTokenizer]:
    if template not in models:
        begin, end = EDGES.get(template, ("<|im_start|>", "<|im_end|>"))
        text = (FOLDER / f"{template}.jinja").read_text()
        folder = model_with(text, *CONTROL[template], bos_token=begin, eos_token=end)
        ours = tokenizers.load(folder)
        plain = replace(ours, template=unmarked(text))
        assert ours.has_markers
        assert not plain.has_markers
        models[template] = AutoTokenizer.from_pretrained(folder), ours, plain
    return models[template]


def encoded(talk: Conversation, tokenizer: ChatTokenizer, supervise: chat.Supervise = "assistant") -> tuple[list, list]:
    ((tokens, mask),) = chat.tokenise([chat.render(talk, tokenizer, supervise)], tokenizer)
    return tokens.tolist(), mask.astype(int).tolist()


@pytest.mark.parametrize(("template", "name", "messages", "tools"), CASES, ids=[f"{t}-{n}" for t, n, *_ in CASES])
def test_masks_equal_transformers(
    model: tuple[Any, ChatTokenizer, ChatTokenizer],
    template: str,
    name: str,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
) -> None:
    """With the template's markers, and without them by growing prefixes, where it does not rewrite earlier turns."""
    reference, ours, plain = model
    want = reference.apply_chat_template(messages, tools, return_assistant_tokens_mask=True, return_dict=True)
    assert 0 < sum(want["assistant_masks"]) < len(want["input_ids"])
    talk = Conversation(1, messages, 1.0, tools=tools)
    for tokenizer in (ours, plain):
        if tokenizer is plain and (template, name) in REWRITTEN:
            with pytest.raises(UserError, match=r"data\.turns: split"):
                encoded(talk, tokenizer)
            continue
        tokens, mask = encoded(talk, tokenizer)
        assert tokens == want["input_ids"][: len(tokens)]
        assert mask == want["assistant_masks"][: len(tokens)]
        assert not any(want["assistant_masks"][len(tokens) :])


@pytest.mark.parametrize("template", [*CONTROL])
def test_a_masked_turn_is_not_supervised(model: tuple[Any, ChatTokenizer, ChatTokenizer], template: str) -> None:
    """Each of three answers masked in turn, and all but the last: what is supervised is the others' own."""
    _, ours, plain = model
    turns = [i for i, message in enumerate(LONG) if message["role"] == "assistant"]
    for tokenizer in (ours,) if template in THINKING else (ours, plain):
        tokens, whole = encoded(Conversation(1, LONG, 1.0), tokenizer)
        parts = []
        for i in turns:
            masked = frozenset(turns) - {i}
            again, part = encoded(Conversation(1, LONG, 1.0, masked), tokenizer)
            assert again == tokens
            assert sum(part) > 0
            parts.append(part)
        assert [sum(on) for on in zip(*parts, strict=True)] == whole
        assert encoded(Conversation(1, LONG, 1.0), tokenizer, "last")[1] == parts[-1]
        if template in THINKING:
            continue
        everything = encoded(Conversation(1, LONG, 1.0, frozenset(turns)), tokenizer, "all")[1]
        assert everything[: len(whole)] == [1 - on for on in whole]


@pytest.mark.parametrize("template", THINKING)
def test_thoughts_that_the_template_drops_are_supervised_a_row_a_turn(
    model: tuple[Any, ChatTokenizer, ChatTokenizer], template: str
) -> None:
    _, ours, plain = model
    messages = chat_of("a", "<think>\none\n</think>\n\nb", "c", "<think>\ntwo\n</think>\n\nd")
    with pytest.raises(UserError) as error:
        encoded(Conversation(1, messages, 1.0), plain)
    for said in ("messages[1]", "<think>", "data.turns: split", "data.supervise: last"):
        assert said in str(error.value)
    for tokenizer in (ours, plain):
        rows = [encoded(part, tokenizer) for part in chat.split(Conversation(1, messages, 1.0))]
        texts = [
            tokenizer.backend.decode([t for t, on in zip(*row, strict=True) if on], skip_special_tokens=False)
            for row in rows
        ]
        opened = "<think>\n" if template == "qwen3" else ""  # the other's generation prompt ends in that
        assert texts == [f"{opened}one\n</think>\n\nb<|im_end|>", f"{opened}two\n</think>\n\nd<|im_end|>"]
        whole = tokenizer.backend.decode(rows[1][0], skip_special_tokens=False)
        assert "one" not in whole, "as the model will see it when it answers"
        (only,) = chat.split(Conversation(1, messages, 1.0, frozenset({1})))
        assert encoded(only, tokenizer) == rows[1]


@pytest.mark.parametrize("template", THINKING)
def test_a_rows_own_variables_reach_the_template(
    model: tuple[Any, ChatTokenizer, ChatTokenizer], template: str
) -> None:
    """Without thinking, the empty thought is part of the prompt and so not supervised."""
    *_, plain = model
    opened = "<think>\n" if template == "qwen3" else ""
    supervised = [
        sum(encoded(Conversation(1, chat_of("a", "b"), 1.0, template=variables), plain)[1])
        for variables in ({}, {"enable_thinking": False})
    ]
    assert supervised[1] == len(plain.backend.encode("b<|im_end|>").ids)
    assert supervised[0] == supervised[1] + len(plain.backend.encode(opened + "\n</think>\n\n").ids)
