"""What is learned of any conversation under any small template: what transformers writes for the assistant."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from bft_megatron.conversations import chat, masks, tokenizers
from bft_megatron.conversations.chat_tokenizer import BREAK, ChatTokenizer
from bft_megatron.errors import UserError
from bft_megatron.reading.formats import conversation
from bft_megatron.recipe.sources import SourceSettings
from tests.data.behaving import Behaviour, behaviours
from tests.helpers.fuzzing import examples
from tests.helpers.material import TINY, unmarked

BEHAVIOURS = behaviours(60)
TOOLS = [{"type": "function", "function": {"name": "go", "parameters": {"to": {"default": None}}}}]

texts = st.sampled_from(
    ["a", "No.", "é🙂 b", "<", "m", "im_end", "  c\n", "0", "01 or so", "<think>x</think>y", "</call>"]
)
leaves = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "Oslo's", 'a "b"', "é"])
arguments = st.dictionaries(
    st.sampled_from(["to", "when", "é"]),
    st.recursive(leaves, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.just("k"), inner, max_size=1)),
    max_size=3,
)
written = arguments | arguments.map(json.dumps) | arguments.map(lambda a: json.dumps(a, ensure_ascii=False, indent=1))
calls = st.lists(
    st.builds(
        lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}},
        st.sampled_from(["go", "look_up_it"]),
        written,
    ),
    min_size=1,
    max_size=2,
)
no_content = st.sampled_from([{}, {"content": None}, {"content": ""}])
thoughts = st.just({}) | st.sampled_from(["Well.", "t"]).map(lambda t: {"reasoning_content": t})
asked = st.builds(lambda text: [{"role": "user", "content": text}], texts)
spoken = st.builds(lambda text, t: [{"role": "assistant", "content": text} | t], texts, thoughts)
called = st.builds(
    lambda content, t, calls: [
        {"role": "assistant", "tool_calls": calls} | content | t,
        {"role": "tool", "content": "r"},
    ],
    no_content | texts.map(lambda text: {"content": text}),
    thoughts,
    calls,
)
openings = st.sampled_from(["system", "developer"]).map(lambda role: [{"role": role, "content": "S"}])
rows = st.builds(
    lambda opening, first, turns, tools: {
        "messages": [*opening, *first, *(message for turn in turns for message in turn)],
        "tools": tools,
    },
    st.just([]) | openings,
    asked,
    st.lists(spoken | called | st.builds(lambda a, b: a + b, spoken, asked), min_size=1, max_size=3),
    st.none() | st.just(TOOLS),
)


@cache
def base() -> ChatTokenizer:
    loaded = tokenizers.load(TINY)
    loaded.backend.add_special_tokens(["<|mid|>"])
    return replace(loaded, control=(*loaded.control, "<|mid|>"))


@cache
def tokenizer_of(behaviour: Behaviour) -> ChatTokenizer:
    return replace(base(), template=unmarked(behaviour.source))


def wanted(behaviour: Behaviour, row: dict[str, Any]) -> tuple[str, list[str]]:
    """The conversation's text and the assistant's parts, by transformers."""
    messages = [behaviour.given(m | {"role": "system"} if m["role"] == "developer" else m) for m in row["messages"]]
    while messages[-1]["role"] != "assistant":  # what follows the last answer is left out
        messages.pop()
    (text,), (spans,) = render_jinja_template(
        [messages], row["tools"], chat_template=behaviour.source, return_assistant_tokens_mask=True
    )
    return text, [text[start:end] for start, end in spans]


@settings(max_examples=examples(2000), deadline=None)
@given(behaviour=st.sampled_from(BEHAVIOURS), row=rows)
def test_what_is_learned_is_what_transformers_writes_for_the_assistant(
    behaviour: Behaviour, row: dict[str, Any]
) -> None:
    read = conversation(json.loads(json.dumps(row)), SourceSettings("x"), 1, 0, "x:1")
    answers = [m for m in row["messages"] if m["role"] == "assistant"]
    tokenizer = tokenizer_of(behaviour)
    if behaviour.prompt == "other" or any(map(behaviour.loses, answers)):
        with pytest.raises(UserError, match=r"messages\[\d\]"):
            chat.render(read, tokenizer, "assistant")
        return
    text, parts = wanted(behaviour, row)
    found = chat.render(read, tokenizer, "assistant")
    assert found.text.replace(BREAK, "") == text
    assert [found.text[a:b].replace(BREAK, "") for a, b in found.spans] == parts
    if behaviour.end.startswith("token"):
        ((tokens, learned),) = masks.tokenise([found], tokenizer)
        assert tokenizer.backend.decode(tokens[learned].tolist(), skip_special_tokens=False) == "".join(parts)
