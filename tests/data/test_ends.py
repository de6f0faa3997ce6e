"""The control tokens that end the learned turns are found in the rows; others, and those inside answers, are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from bft_megatron.conversations import tokenizers
from bft_megatron.data.ends import stop_tokens
from bft_megatron.data.prepare import Prepared, prepare
from bft_megatron.recipe.schema import DataSettings
from tests.helpers.material import CHATML, LLAMA, MISTRAL, chat_of, unmarked

END = "<|im_end|>"
OUTSIDE = CHATML.replace("{{ m.content }}<|im_end|>{% endgeneration %}", "{{ m.content }}{% endgeneration %}<|im_end|>")
# The end of turn and the newline after it are both inside the markers.
NEWLINE = CHATML.replace("<|im_end|>{% endgeneration %}", "<|im_end|>\n\n{% endgeneration %}")
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
# In the manner of Llama 3.1: a turn with a call ends in another token than an answer.
CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}<|eom|>{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# In the manner of gpt-oss: a turn's thought ends in the token that also ends the answers before the last one.
CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{% if loop.last %}think<|im_end|>{{ m.content }}<|return|>{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)


def call(name: str) -> dict[str, Any]:
    function = {"name": name, "arguments": {}}
    return {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}


def made(folder: Path, model: Path, *rows: list[dict[str, Any]], **settings: Any) -> Prepared:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return prepare(path, model, DataSettings(str(path), **{"seq_length": 256} | settings), 1, folder / "cache")


@pytest.mark.parametrize(
    ("template", "control", "expected"),
    [
        (CHATML, (), END),
        (unmarked(CHATML), (), END),
        (NEWLINE, (), END),
        (LLAMA, ("<|header|>", "<|/header|>", "<|eot|>"), "<|eot|>"),
        (MISTRAL, ("[INST]", "[/INST]", "</s>"), "</s>"),
    ],
    ids=["chatml", "without markers", "newline learned", "llama", "mistral"],
)
@pytest.mark.parametrize("settings", [{}, {"supervise": "last"}, {"turns": "split"}, {"supervise": "all"}], ids=str)
def test_end_of_turn(
    template: str, control: tuple[str, ...], expected: str, settings: dict, model_with: Callable, tmp_path: Path
) -> None:
    rows = [chat_of("a", "b", "c", "d"), chat_of("a", "b")]
    model = model_with(template, *control)
    result = made(tmp_path, model, *rows, **settings)
    assert stop_tokens(result.counts) == {tokenizers.load(model).backend.token_to_id(expected)}
    turns = 2 if "supervise" in settings else 3
    assert (result.counts.turns, list(result.counts.ends.values())) == (turns, [turns])


@pytest.mark.parametrize("template", [PLAIN, OUTSIDE], ids=["no end of turn", "outside the markers"])
def test_a_template_that_teaches_no_end(template: str, model_with: Callable, tmp_path: Path) -> None:
    result = made(tmp_path, model_with(template), chat_of("a", "b", "c", "d"))
    assert (stop_tokens(result.counts), result.counts.turns, result.counts.ends) == (set(), 2, {})


def test_a_rare_call_ends_in_a_token_of_its_own(model_with: Callable, tmp_path: Path) -> None:
    model = model_with(CALLS, "<|eom|>")
    answers, asked = [chat_of("a", "b")] * 300, {"role": "user", "content": "a"}
    result = made(tmp_path, model, *answers, [asked, call("look"), {"role": "tool", "content": "c"}, call("go")])
    assert stop_tokens(result.counts) == {2, 500}
    assert result.counts.ends == {"2": 300, "500": 2}


def test_a_token_inside_answers_is_no_stop(model_with: Callable, tmp_path: Path) -> None:
    result = made(tmp_path, model_with(CHANNELS, "<|return|>"), chat_of("a", "b", "c", "d", "e", "f"))
    assert (result.counts.ends, result.counts.inside) == ({"2": 2, "500": 1}, {"2": 1})
    assert stop_tokens(result.counts) == {500}


def test_a_truncated_turn_has_no_end(model_with: Callable, tmp_path: Path) -> None:
    rows = chat_of("a", "b", "c", "d " * 100)
    result = made(tmp_path, model_with(CHATML), rows, overlong="truncate", seq_length=64)
    assert (result.counts.overlong, result.counts.turns, result.counts.ends) == (1, 1, {"2": 1})


def test_an_answer_that_happens_to_end_in_an_added_token_of_text(tmp_path: Path, model_with: Callable) -> None:
    """</think>, as Qwen 3 has it, is a token in any text; where most answers end in it, it is their end."""
    model = model_with(PLAIN)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("</think>", special=False)])
    tokenizer.save(str(model / "tokenizer.json"))
    plain, thinking = chat_of("a", "b"), chat_of("a", "b</think>")
    assert stop_tokens(made(tmp_path, model, *[plain] * 150, thinking).counts) == set()
    assert stop_tokens(made(tmp_path, model, *[plain] * 50, thinking).counts) == {500}
    inside = made(tmp_path, model, *[chat_of("a", "b</think>c")] * 2, thinking).counts
    assert stop_tokens(inside) == set()
    inside.add(made(tmp_path, model, *[plain] * 2, thinking).counts)  # another source of the same run
    assert stop_tokens(inside) == set()


def test_sentencepiece(sentencepiece_like: Callable, tmp_path: Path) -> None:
    model = sentencepiece_like(MISTRAL)
    result = made(tmp_path, model, chat_of("a", "b", "c", "d"))
    assert stop_tokens(result.counts) == {tokenizers.load(model).backend.token_to_id("</s>")}
    assert result.counts.turns == 2
