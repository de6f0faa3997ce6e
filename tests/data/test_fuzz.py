"""Any file of lines: each is prepared right, or refused with its file and line."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bft_megatron.conversations.chat_tokenizer import ChatTokenizer
from bft_megatron.data.encoding import Encoder
from bft_megatron.errors import UserError
from bft_megatron.reading.sources import open_source
from bft_megatron.recipe.schema import DataSettings
from tests.helpers.fuzzing import examples
from tests.helpers.material import chat_of

LIMIT = 120_000
"""Bytes of the longest row, `data.max_row_bytes`."""

CONTROL = ("<|im_start|>", "<|im_end|>", "<pad>")

words = st.sampled_from([*CONTROL, "<|im_", "end|>", "é🙂", "\0", "\u2028", "\\ud800", " ", "\n", "a"])
poison = st.sampled_from(["\ud800", "\ufdd0", ""])
texts = st.integers(0, 19).flatmap(lambda n: poison if n == 0 else st.lists(words, min_size=1, max_size=4).map("".join))
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.just(10**400)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=5,
)


def mostly(right: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """The right kind of value, nineteen times in twenty."""
    return st.integers(0, 19).flatmap(lambda n: trees if n == 0 else right)


roles = mostly(st.sampled_from(["system", "user", "assistant", "assistant", "tool", "nobody"]))
parts = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts}), max_size=2)
functions = st.fixed_dictionaries({"name": texts, "arguments": trees})
calls = st.lists(st.fixed_dictionaries({"function": functions}), max_size=1)
messages = st.fixed_dictionaries(
    {"role": roles, "content": mostly(texts | parts)},
    optional={
        "weight": mostly(st.integers(0, 1)),
        "loss": mostly(st.booleans()),
        "name": texts,
        "tool_calls": mostly(calls),
    },
)
objects = st.dictionaries(texts, trees, max_size=2)
chats = st.fixed_dictionaries(
    {"messages": mostly(st.lists(mostly(messages), max_size=4))},
    optional={
        "weight": mostly(st.floats(0, 9)),
        "tools": mostly(st.lists(objects, max_size=1)),
        "chat_template_kwargs": mostly(objects),
        "system": texts,
    },
)
speakers = mostly(st.sampled_from(["human", "gpt", "function_call"]))
turns = st.fixed_dictionaries({"from": speakers, "value": mostly(texts)})
history = mostly(st.just([["a", "b"]]))
pairs = st.fixed_dictionaries({"instruction": mostly(texts), "output": mostly(texts)}, optional={"history": history})
answers = st.lists(words, max_size=4).map(lambda parts: "".join(parts) + "!")
good = st.lists(st.tuples(answers, answers), min_size=1, max_size=2).map(
    lambda said: {"messages": chat_of(*(text for turn in said for text in turn))}
)
rows = good | chats | st.fixed_dictionaries({"conversations": st.lists(turns, max_size=3)}) | pairs | trees
huge = st.just(json.dumps({"prompt": "a " * 50_000, "completion": "b<|im_end|>"}).encode())


def padded(row: dict[str, Any], size: int) -> bytes:
    """A line of `size` bytes, of which most are in a column that nobody reads."""
    line = json.dumps(row).encode()
    return json.dumps(row | {"about": "x" * (size - len(line) - len(', "about": ""'))}).encode()


near = st.builds(padded, good, st.integers(LIMIT - 2, LIMIT + 2))
long = st.lists(answers, min_size=10, max_size=40).map(lambda said: json.dumps({"messages": chat_of(*said)}).encode())
nested = st.just(b'{"messages": ' + b"[" * 50_000)
lines = st.one_of(
    *[rows.map(lambda row: json.dumps(row).encode())] * 8, st.binary(max_size=30), huge, nested, near, long
)


def spelled(tokens: list[int], tokenizer: ChatTokenizer) -> list[int]:
    """How often each control token occurs as a token."""
    return [tokens.count(tokenizer.backend.token_to_id(token)) for token in CONTROL]


def check(line: bytes, tokens: list[int], supervised: list[bool], tokenizer: ChatTokenizer) -> None:
    """A sample that was made of a line has the template's own control tokens and ends what it learns with one."""
    row = json.loads(line)
    chat = row.get("messages") or row.get("conversations") or []
    turns = json.loads(chat) if isinstance(chat, str) else chat
    roles = [message.get("role", message.get("from")) for message in turns]
    if not turns:
        history = row.get("history") or []
        roles = ["user", "assistant"] * (1 + len(json.loads(history) if isinstance(history, str) else history))
    own = {"assistant": "assistant", "gpt": "assistant", "function_call": "assistant"}
    last = max(i for i, role in enumerate(roles) if own.get(role) == "assistant")
    extra = bool(row.get("system")) and roles[0] != "system"
    said = last + 1 + extra
    assert spelled(tokens, tokenizer) == [said, said, 0]
    ends = [i for i, on in enumerate(supervised) if on and not (i + 1 < len(supervised) and supervised[i + 1])]
    assert all(tokens[i] == tokenizer.backend.token_to_id("<|im_end|>") for i in ends)
    assert 0 < len(ends) <= sum(own.get(role) == "assistant" for role in roles)


@settings(
    max_examples=examples(100, a_second=15),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
)
@given(written=st.lists(lines, min_size=10, max_size=10))
def test_a_thousand_lines(tmp_path_factory: pytest.TempPathFactory, tiny: ChatTokenizer, written: list[bytes]) -> None:
    written = [line.replace(b"\n", b" ").replace(b"\r", b" ") for line in written]
    path = tmp_path_factory.mktemp("fuzz") / "rows.jsonl"
    path.write_bytes(b"\n".join(written))
    source = open_source(path)
    (chunk,) = source.chunks(LIMIT)
    skip = Encoder(source, tiny, DataSettings(str(path), seq_length=200_000, on_error="skip"))(chunk)
    lines = skip.samples["line"].to_pylist()
    refused = [int(said.removeprefix(f"{path}:").partition(":")[0]) for said in skip.refused]
    blank = [n for n, line in enumerate(written, start=1) if not line.strip()]
    assert len(lines) + skip.counts.unsupervised == skip.counts.conversations
    assert skip.counts.conversations + len(refused) + len(blank) == len(written)
    assert not {*refused} & {*lines}
    assert refused == sorted(refused)
    long = [int(said.removeprefix(f"{path}:").partition(":")[0]) for said in skip.refused if "max_row_bytes" in said]
    assert long == [n for n, line in enumerate(written, start=1) if len(line) > LIMIT]
    for line, sample in zip(lines, skip.samples.to_pylist(), strict=True):
        check(written[line - 1], sample["tokens"], sample["learned"], tiny)
        assert math.isfinite(sample["weight"])
        assert sample["weight"] >= 0
    stop = Encoder(source, tiny, DataSettings(str(path), seq_length=200_000))
    if refused:
        with pytest.raises(UserError) as error:
            stop(chunk)
        assert str(error.value) == skip.refused[0]
    else:
        assert stop(chunk).samples == skip.samples
