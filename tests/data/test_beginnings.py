"""The beginnings of a conversation found in one run, held to each beginning rendered by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bft_megatron.conversations import chat, templates, turns
from bft_megatron.conversations.chat_tokenizer import ChatTokenizer
from bft_megatron.errors import UserError
from bft_megatron.reading.formats import Conversation
from tests.helpers.fuzzing import examples
from tests.helpers.material import CHATML, DEFAULT_SYSTEM, LLAMA, MISTRAL, THINKING, chat_of, unmarked

END = "{% endfor %}"
SAY = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LOOP = "{% for m in messages %}" + SAY + END

KNOWN = {
    **{file.stem: unmarked(file.read_text()) for file in (Path(__file__).parent / "templates").glob("*.jinja")},
    **{name: unmarked(text) for name, text in {"chatml": CHATML, "default": DEFAULT_SYSTEM, "llama": LLAMA}.items()},
    "mistral's old": unmarked(MISTRAL),
    "thinking": THINKING,
}
ODD = {
    "default of the prompt": "{% if add_generation_prompt is not defined %}{% set add_generation_prompt = false %}"
    "{% endif %}" + LOOP + ASK,
    "ends with a text": LOOP + "<|end|>" + ASK,
    "asks at the last": LOOP.replace(END, "{% if loop.last and add_generation_prompt %}A:{% endif %}" + END),
    "looks ahead to write nothing": LOOP.replace(END, "{{ '' if loop.nextitem is defined else '!' }}" + END),
    "looks ahead before it writes": LOOP.replace("<|im_start|>", "{{ '!' if loop.last else '' }}<|im_start|>", 1) + ASK,
    "indexes ahead": LOOP.replace("{% endfor %}", "{{ '' if messages[loop.index] is defined else '!' }}{% endfor %}"),
    "indexes far ahead": "{{ 'long' if messages[3] is defined else 'short' }}" + LOOP + ASK,
    "indexes from the end": "{{ messages[-1].role }}" + LOOP + ASK,
    "counts": "{{ messages | length }}" + LOOP + ASK,
    "counts in the loop": LOOP.replace("{% endfor %}", "{{ loop.length }}{% endfor %}"),
    "counts behind": LOOP + "{{ messages | length }}",
    "loops twice": "{% for m in messages %}{{ m.role[0] }}{% endfor %}" + LOOP + ASK,
    "loops behind": LOOP + "{% for m in messages %}{{ m.role[0] }}{% endfor %}" + ASK,
    "loops over another list behind": LOOP + "{% for m in 'ab' %}{{ m }}{% endfor %}" + ASK,
    "loops in a condition": "{% if messages %}" + LOOP + "{% endif %}" + ASK,
    "loops in a macro": "{% macro all(messages) %}" + LOOP + "{% endmacro %}{{ all(messages) }}" + ASK,
    "loops inside a loop": LOOP.replace("{% endfor %}", "{% for n in messages %}.{% endfor %}{% endfor %}"),
    "filters": "{% for m in messages | selectattr('role', 'ne', 'system') %}" + SAY + "{% endfor %}" + ASK,
    "has a condition": "{% for m in messages if m.content %}" + SAY + "{% endfor %}" + ASK,
    "has an else": LOOP.replace("{% endfor %}", "{% else %}none{% endfor %}"),
    "recursive": LOOP.replace("messages %}", "messages recursive %}") + ASK,
    "reversed": "{% for m in messages[::-1] %}" + SAY + "{% endfor %}" + ASK,
    "slices": "{% set rest = messages[1:] %}{{ messages[0].content }}{% for m in rest[1:] %}" + SAY + END + ASK,
    "slices to an end": "{% for m in messages[:3] %}" + SAY + "{% endfor %}" + ASK,
    "is empty": "{{ 'yes' if messages[2:] else 'no' }}" + LOOP + ASK,
    "collects": "{% set all = namespace(text='') %}{% for m in messages %}{% set all.text = all.text + m.content %}"
    "{% endfor %}{{ all.text }}" + ASK,
    "collects a block": "{% set all %}" + LOOP + "{% endset %}{{ all }}" + ASK,
    "remembers": "{% set last = namespace(role='') %}{% for m in messages %}{{ last.role }}" + SAY
    + "{% set last.role = m.role %}{% endfor %}" + ASK,
    "remembers behind": "{% set last = namespace(role='') %}{% for m in messages %}" + SAY
    + "{% set last.role = m.role %}{% endfor %}{{ last.role }}" + ASK,
    "remembers a switch": "{% set last = namespace(n=0) %}{% for m in messages %}" + SAY
    + "{% set last.n = last.n + 1 %}{% endfor %}{% if last.n > 2 %}many{% endif %}" + ASK,
    "breaks": "{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}" + SAY + "{% endfor %}" + ASK,
    "continues": "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}" + SAY + END + ASK,
    "looks back": LOOP.replace("{% endfor %}", "{{ loop.previtem.role if loop.index > 1 }}{{ loop.cycle('x', 'y') }}"
    "{{ 'new' if loop.changed(m.role) }}{% endfor %}") + ASK,
    "keeps an iterator": "{% set each = messages | map(attribute='role') %}" + LOOP + "{{ each | first }}",
    "shows the list": "{{ messages }}" + LOOP,
    "compares the list": "{{ messages == [] }}" + LOOP + ASK,
    "renames": "{% set messages = messages[1:] %}" + LOOP + ASK,
    "names the watch": "{% set bft_watch = namespace() %}" + LOOP + ASK,
    "other text under a prompt": LOOP.replace(END, "{{ '!' if add_generation_prompt and m.content == 'b' }}" + END),
    "no loop": "{{ messages[0].content }}" + ASK,
}  # fmt: skip
TEMPLATES = KNOWN | ODD

CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
contents = st.sampled_from(["", " ", "a", "b", "b \n", "\n<|im_end|>c", "<think>x</think>y", "é🙂"])
others = st.builds(
    lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "tool"]), contents
)
answers = st.builds(
    lambda content, calls: {"role": "assistant", "content": content} | ({"tool_calls": CALL} if calls else {}),
    contents,
    st.booleans(),
)
systems = st.builds(lambda content: [{"role": "system", "content": content}], contents)
any_messages = st.builds(
    lambda system, middle, last: [*system, *middle, last],
    st.just([]) | systems,
    st.lists(others | answers, max_size=11),
    answers,
)
alternating = st.lists(contents, min_size=2, max_size=12).map(lambda said: chat_of(*said[: len(said) // 2 * 2]))
talks = st.builds(
    lambda messages, tools, masked: Conversation(
        1,
        messages,
        1.0,
        frozenset(i for i in masked if i < len(messages) and messages[i]["role"] == "assistant"),
        tools,
    ),
    any_messages | alternating,
    st.none() | st.just(CALL),
    st.frozensets(st.integers(0, 11), max_size=2),
)


def outcome(talk: Conversation, tokenizer: ChatTokenizer, supervise: chat.Supervise) -> Any:
    try:
        return chat.render(talk, tokenizer, supervise)
    except UserError as e:
        return str(e)


@settings(max_examples=examples(60), deadline=None)
@given(talk=talks, name=st.sampled_from([*TEMPLATES]), supervise=st.sampled_from(["assistant", "all"]))
def test_one_run_finds_what_each_beginning_gives(
    tiny: ChatTokenizer, talk: Conversation, name: str, supervise: chat.Supervise
) -> None:
    tokenizer = replace(tiny, template=TEMPLATES[name])
    with pytest.MonkeyPatch.context() as patch:
        found = []
        for many in (1, 10**9):
            patch.setattr(turns, "MANY", many)
            found.append(outcome(talk, tokenizer, supervise))
    assert found[0] == found[1]
    for prompt in (False, True):
        try:
            known = tokenizer.beginnings(talk.messages, prompt, talk.tools)
        except UserError:
            continue
        if known is not None:
            assert known.text == tokenizer.render(talk.messages, prompt, talk.tools)[0]
            for k, end in known.ends.items():
                if k:
                    alone, _ = tokenizer.render(talk.messages[:k], prompt, talk.tools)
                    assert known.text[:end] + known.rest == alone


@pytest.mark.parametrize("name", [*TEMPLATES])
def test_which_templates_show_all_beginnings_in_one_run(tiny: ChatTokenizer, name: str) -> None:
    """Not one that looks ahead, counts, or writes behind its loop what depends on the loop."""
    tokenizer = replace(tiny, template=TEMPLATES[name])
    messages = chat_of("a", "b", "c", "d", "e", "f")
    known = tokenizer.beginnings(messages)
    shown = "all" if known and {1, 2, 3, 4, 5} <= {*known.ends} else "some" if known else "none"
    assert shown == {**dict.fromkeys(KNOWN, "all"), **SHOWN}.get(name, "none")


SHOWN = {
    "qwen3": "none",
    "qwen35": "none",
    "mistral": "none",
    "thinking": "none",
    **dict.fromkeys(("default of the prompt", "ends with a text", "remembers", "looks back"), "all"),
    **dict.fromkeys(("other text under a prompt", "continues"), "all"),
    **dict.fromkeys(("indexes ahead", "indexes far ahead", "slices", "is empty"), "some"),
    "renames": "all",
}


def test_work_grows_with_the_turns_alone(tiny: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """In characters written by the template; 4,000 messages are done."""
    written = []
    text = templates._Run.text

    def counting(run: Any, *arguments: Any) -> str:
        written[-1] += len(made := text(run, *arguments))
        return made

    monkeypatch.setattr(templates._Run, "text", counting)
    for count in (40, 4000):
        written.append(0)
        messages = chat_of(*["Say it again, please."] * count)
        rendered = chat.render(Conversation(1, messages, 1.0), tiny, "assistant")
        assert {rendered.text[a:b] for a, b in rendered.spans} == {"Say it again, please.<|im_end|>"}
        assert len(rendered.spans) == count / 2
    assert written[1] < 101 * written[0]


def test_turns_that_cannot_be_found_in_one_run_are_bounded(
    tiny: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "MOST", 1000)
    tokenizer = replace(tiny, template=KNOWN["mistral"])
    messages = chat_of(*["a"] * 60)
    with pytest.raises(UserError, match=r"has 60 messages.*data\.supervise: last"):
        chat.render(Conversation(1, messages, 1.0), tokenizer, "assistant")
    assert len(chat.render(Conversation(1, messages, 1.0), tokenizer, "last").spans) == 1
