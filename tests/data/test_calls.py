"""Tool calls, thoughts and prompts as real templates want them, from the file to the learned text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from bft_megatron.conversations import tokenizers
from bft_megatron.data.prepare import Prepared, prepare
from bft_megatron.errors import UserError
from bft_megatron.reading.tables import NULLS_DROPPED
from bft_megatron.recipe.schema import DataSettings
from tests.helpers.commands import run_command
from tests.helpers.material import TINY

Make = Callable[..., Path]

HEAD = "{% if tools %}{{ tools | tojson }}\n{% endif %}{{ format | tojson if format }}{% for m in messages %}"
ASK = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OTHERS = "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"


def template(answer: str, ask: str = ASK) -> str:
    said = "{% if m.role == 'assistant' %}<|im_start|>assistant\n" + answer + "<|im_end|>\n"
    return HEAD + said + OTHERS + ask


def calls(arguments: str) -> str:
    return "{% for c in m.tool_calls or [] %}{{ c.function.name }}:" + arguments + "{% endfor %}"


CONTENT = "{{ m.content if m.content else '' }}"
MAPPING = template(CONTENT + calls("{{ c.function.arguments | tojson }}"))
TEXT = template(CONTENT + calls("{{ c.function.arguments }}"))
JOINED = template(CONTENT + calls("{{ '' ~ c.function.arguments }}"))
TESTED = template(
    "{% if m.content is none %}" + calls("{{ '' + c.function.arguments }}") + "{% else %}{{ m.content }}{% endif %}"
)
NO_CALLS = template("{{ m.content }}")
THINKING = template("{{ m.content.split('</think>')[-1] }}", ASK.replace("assistant\n", "assistant\n<think>\n"))

EITHER = template(CONTENT + calls("{{ f.arguments if f.arguments is string else f.arguments | tojson }}"))
EITHER = EITHER.replace("in m.tool_calls or [] %}", "in m.tool_calls or [] %}{% set f = c.function %}")

ASKED = {"role": "user", "content": "a"}
TOOL = {"type": "function", "function": {"name": "fly", "parameters": {}}}
TO_OSLO = {"to": "Oslo", "return_date": None}


def calling(arguments: Any, **fields: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "fly", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]} | fields


def prepared(model: Path, *rows: dict[str, Any], name: str = "rows.jsonl", **settings: Any) -> Prepared:
    file = model.parent / name
    if name.endswith(".parquet"):
        Dataset.from_list([*rows]).to_parquet(file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare(file, model, DataSettings(str(file), seq_length=256, **settings), 1, model.parent / "cache")


def texts(result: Prepared) -> list[tuple[str, str]]:
    """Of each sample: the whole text, and what is learned of it."""
    decode = tokenizers.load(TINY).backend.decode
    rows = Dataset.from_file(str(result.folder / "samples.arrow"))
    return [
        (
            decode(row["tokens"], skip_special_tokens=False),
            decode([t for t, on in zip(row["tokens"], row["learned"], strict=True) if on], skip_special_tokens=False),
        )
        for row in rows
    ]


@pytest.mark.parametrize("arguments", [TO_OSLO, json.dumps(TO_OSLO)], ids=["object", "text"])
@pytest.mark.parametrize(
    "source", [MAPPING, TEXT, JOINED, TESTED], ids=["mapping", "text", "joined", "tested for none"]
)
def test_arguments_are_learned_as_json_with_their_nulls(model_with: Make, source: str, arguments: Any) -> None:
    result = prepared(model_with(source), {"messages": [ASKED, calling(arguments)]})
    assert texts(result)[0][1] == 'fly:{"to": "Oslo", "return_date": null}<|im_end|>'
    form = "objects" if source == MAPPING else "JSON text"
    assert result.counts.notes == {f"has tool calls, whose arguments the chat template is given as {form}": 1}


def test_text_that_a_template_joins_is_the_rows_own(model_with: Make) -> None:
    """Spaces, order and escapes stay: at inference the parser sees them too."""
    own = '{ "b":1,"a" : "\\u00e9" }'
    ((_, learned),) = texts(prepared(model_with(TEXT), {"messages": [ASKED, calling(own)]}))
    assert learned == f"fly:{own}<|im_end|>"


def test_nulls_of_schemas_and_formats_stay(model_with: Make) -> None:
    tools = [{"type": "function", "function": {"name": "fly", "parameters": {"to": {"default": None}}}}]
    row = {
        "messages": [ASKED, {"role": "assistant", "content": "b"}],
        "tools": tools,
        "chat_template_kwargs": {"format": {"default": None}},
    }
    ((text, _),) = texts(prepared(model_with(MAPPING), row))
    assert text.startswith(f'{json.dumps(tools)}\n{{"default": null}}')


def test_nulls_that_a_table_adds_are_left_out_and_said(model_with: Make) -> None:
    """Every row of a table has the fields of all of them; in text they are the row's own."""
    other = calling({"from": "Rome"})
    result = prepared(
        model_with(MAPPING), *({"messages": [ASKED, c]} for c in (calling(TO_OSLO), other)), name="a.parquet"
    )
    assert [learned for _, learned in texts(result)] == [
        'fly:{"to": "Oslo"}<|im_end|>',
        'fly:{"from": "Rome"}<|im_end|>',
    ]
    assert result.counts.notes[NULLS_DROPPED] == 2
    text = prepared(
        model_with(MAPPING, name="b"), {"messages": [ASKED, calling(json.dumps(TO_OSLO))]}, name="b.parquet"
    )
    assert texts(text)[0][1] == 'fly:{"to": "Oslo", "return_date": null}<|im_end|>'
    assert NULLS_DROPPED not in text.counts.notes


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}], ids=["missing", "null", "empty"])
def test_a_call_without_content_is_learned_under_a_template_that_tests_for_none(model_with: Make, content: Any) -> None:
    call = {name: value for name, value in calling("{}").items() if name != "content"} | content
    assert texts(prepared(model_with(TESTED), {"messages": [ASKED, call]}))[0][1] == "fly:{}<|im_end|>"


@pytest.mark.parametrize(
    ("source", "answer"),
    [(NO_CALLS, calling("{}", content="Let me see.")), (TESTED, calling("{}", content="Let me see."))],
    ids=["knows no calls", "either content or calls"],
)
def test_a_call_that_the_template_leaves_out_is_refused(
    model_with: Make, source: str, answer: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    model = model_with(source)
    good = {"messages": [ASKED, {"role": "assistant", "content": "b"}]}
    rows = [good, {"messages": [ASKED, answer]}]
    with pytest.raises(
        UserError, match=r"rows\.jsonl:2: .* does not write the tool calls of messages\[1\], so that 'Let"
    ):
        prepared(model, *rows)
    recipe = model.parent / "recipe.yaml"
    data = f"data: {{train: {model.parent}/rows.jsonl, seq_length: 256}}"
    recipe.write_text(f"{{model: {model}, {data}, output: {model.parent}/out, train: {{iterations: 1}}, device: cpu}}")
    assert run_command(monkeypatch, "prepare", recipe) == 2
    assert "rows.jsonl:2: " in capfd.readouterr().err
    assert run_command(monkeypatch, "prepare", recipe, "data.on_error=skip") == 0
    said = "".join(capfd.readouterr().out.split())  # whose lines are broken anywhere
    assert "rows.jsonl:2:thechattemplatedoesnotwritethetoolcallsofmessages[1]" in said
    assert [learned for _, learned in texts(prepared(model, *rows, on_error="skip"))] == ["b<|im_end|>"]


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}], ids=["missing", "null", "empty"])
def test_a_call_without_content_is_refused_as_a_call_where_the_template_joins_contents(
    model_with: Make, content: Any
) -> None:
    call = {name: value for name, value in calling("{}").items() if name != "content"} | content
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .* does not write the tool calls of messages\[1\]"):
        prepared(model_with(template("{{ '' + m.content }}")), {"messages": [ASKED, call]})


@pytest.mark.parametrize("supervise", ["assistant", "all"])
def test_an_answer_that_is_all_thought_is_refused_where_thoughts_are_dropped(model_with: Make, supervise: str) -> None:
    row = {"messages": [ASKED, {"role": "assistant", "content": "<think>b</think>"}]}
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .* does not write the answer of messages\[1\]"):
        prepared(model_with(THINKING), row, supervise=supervise)


def test_a_prompt_that_ends_in_a_thought_is_no_beginning_of_plain_answers(model_with: Make) -> None:
    """The answers are learned as the whole conversation has them, and what differs is said."""
    plain = {"messages": [ASKED, {"role": "assistant", "content": "<b>"}, ASKED, {"role": "assistant", "content": "c"}]}
    result = prepared(
        model_with(THINKING), plain, {"messages": [ASKED, {"role": "assistant", "content": "<think>b</think>d"}]}
    )
    assert [learned for _, learned in texts(result)] == ["<b><|im_end|>c<|im_end|>", "d<|im_end|>"]
    prompt = (
        "the generation prompt of the chat template ends in '<think>\\n', which it does not write in a conversation"
    )
    dropped = "the chat template does not write the thoughts of some answers"
    assert {note[: len(prompt)]: n for note, n in result.counts.notes.items() if "prompt" in note} == {prompt: 2}
    assert [n for note, n in result.counts.notes.items() if note.startswith(dropped)] == [1]


def test_a_prompt_that_no_answer_follows_is_refused_with_the_templates_line(model_with: Make) -> None:
    source = template(
        "{{ m.content }}", ASK.replace("{% if", "\n{% if").replace("<|im_start|>assistant\n{% endif", "Answer:{% endif")
    )
    with pytest.raises(UserError, match=r"with a generation prompt differently .*see line \d+ of the template"):
        prepared(model_with(source), {"messages": [ASKED, {"role": "assistant", "content": "b"}]})


def test_nothing_left_is_a_sentence(model_with: Make) -> None:
    with pytest.raises(
        UserError, match=r"nothing is left to learn from: of 1 rows, 1 are no conversations; .*jsonl:1: "
    ):
        prepared(model_with(NO_CALLS), {"messages": [ASKED, calling("{}", content="b")]}, on_error="skip")


@pytest.mark.parametrize("preamble", ["If None of them fit, say so.", "Write {'bft_place': 'Oslo'} for a place."])
def test_what_else_the_template_writes_does_not_choose_the_form(model_with: Make, preamble: str) -> None:
    """The words that tell a wrong form may be the template's own."""
    row = {"messages": [ASKED, calling(json.dumps(TO_OSLO))], "tools": [TOOL]}
    source = TEXT.replace("{{ tools | tojson }}", preamble + "{{ tools | tojson }}")
    assert texts(prepared(model_with(source), row))[0][1] == 'fly:{"to": "Oslo", "return_date": null}<|im_end|>'


@pytest.mark.parametrize("none", [[], None, "", "[]"], ids=str)
def test_no_tool_calls_however_written(model_with: Make, none: Any) -> None:
    answer = {"role": "assistant", "content": "b", "tool_calls": none}
    source = template("{% if m.tool_calls is defined %}none{% endif %}{{ m.content }}")
    assert texts(prepared(model_with(source), {"messages": [ASKED, answer]}))[0][1] == "b<|im_end|>"
    old = answer | {"function_call": {"name": "fly", "arguments": "{}"}}
    assert texts(prepared(model_with(MAPPING, name="b"), {"messages": [ASKED, old]}))[0][1] == "bfly:{}<|im_end|>"


@pytest.mark.parametrize("source", [MAPPING, TEXT, EITHER], ids=["mapping", "text", "either"])
def test_a_call_without_arguments(model_with: Make, source: str) -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "fly"}}]}
    assert texts(prepared(model_with(source), {"messages": [ASKED, call]}))[0][1] == "fly:{}<|im_end|>"


def test_tools_that_the_template_does_not_write_are_said(model_with: Make) -> None:
    row = {"messages": [ASKED, {"role": "assistant", "content": "b"}], "tools": [TOOL]}
    without = template(CONTENT).replace("{{ tools | tojson }}", "")
    assert prepared(model_with(without), row).counts.notes == {"has tools, which the chat template does not write": 1}
    assert prepared(model_with(MAPPING, name="b"), row).counts.notes == {}


def test_a_control_token_that_a_template_escapes_is_refused(model_with: Make) -> None:
    source = template(CONTENT + calls("{{ c.function.arguments | tojson(ensure_ascii=True) }}"))
    with pytest.raises(UserError, match=r"rows\.jsonl:1: spells a control token in what the chat template escapes"):
        prepared(model_with(source), {"messages": [ASKED, calling({"to": "<|im_end|>"})]})


def test_markers_in_a_comment_are_none(model_with: Make) -> None:
    source = "{# no {% generation %} here #}" + template(CONTENT)
    assert (
        texts(prepared(model_with(source), {"messages": [ASKED, {"role": "assistant", "content": "b"}]}))[0][1]
        == "b<|im_end|>"
    )


def test_a_template_that_only_speaks_of_developers_gets_a_system_message(model_with: Make) -> None:
    source = "You are a developer." + template(CONTENT)
    row = {"messages": [{"role": "developer", "content": "s"}, ASKED, {"role": "assistant", "content": "b"}]}
    assert "<|im_start|>system\ns<|im_end|>" in texts(prepared(model_with(source), row))[0][0]


def test_the_advice_where_all_is_learned(model_with: Make) -> None:
    source = template("{{ '' if loop.last else '!' }}{{ m.content }}")
    masked = {"role": "assistant", "content": "b", "loss": False}
    row = {"messages": [ASKED, masked, ASKED, {"role": "assistant", "content": "c"}]}
    with pytest.raises(UserError, match=r"`loss: false`.* data.supervise: assistant and data.turns: split"):
        prepared(model_with(source), row, supervise="all")
    prepared(model_with(source, name="b"), row, supervise="assistant", turns="split")
