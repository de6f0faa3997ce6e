"""Checking that the words of each supervised turn are in the text that is learned.

A template may leave an answer out without an error: one that writes a call only where the content `is none`, or that
does not know tool calls. Then only its own text would be learned, such as the end of the turn. Words that fill the
learned text are there. Of others (a template may trim or rearrange them) another rendering tells, with other words in
their place: if the same text is learned, they are not written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bft_megatron.conversations.chat_tokenizer import BREAK
from bft_megatron.conversations.templates import Span
from bft_megatron.conversations.thoughts import FIELDS
from bft_megatron.conversations.turns import Turns, other_words
from bft_megatron.errors import UserError

_ESCAPED = BREAK.encode("ascii", "backslashreplace").decode()

_TELLING = 8
"""Characters of words that a template hardly writes of its own, as it does a short word or the letters of a token."""


@dataclass(frozen=True)
class _Words:
    """A part of an answer: its name in messages, its words, and the same message with other words in their place."""

    name: str
    words: list[str]
    otherwise: dict[str, Any]


def check_readable(turns: Turns) -> None:
    """Raise UserError if the template wrote a message's control token so that it cannot be kept as text."""
    if _ESCAPED in turns.text:
        raise UserError(
            "spells a control token in what the chat template escapes to ASCII, so that it would not be learned as it "
            "is: take it out, or name it in data.special_tokens"
        )


def names_tools(text: str, tools: list[Any] | None) -> bool:
    """Return whether a rendered conversation names each of its tools."""
    functions = [tool.get("function", tool) for tool in tools or () if isinstance(tool, dict)]
    names = [function.get("name") for function in functions if isinstance(function, dict)]
    return all(name in text for name in names if isinstance(name, str))


def check(turns: Turns, spans: dict[int, Span]) -> None:
    """Check the turns whose learned spans are known: message -> span.

    Raises:
        UserError: the template leaves out an answer, or its tool calls.
    """
    for i, (start, end) in spans.items():
        _check(turns, i, turns.text[start:end])


def check_anywhere(turns: Turns, wanted: list[int], spans: list[Span]) -> None:
    """Check turns that lie somewhere in the learned spans. Raises UserError as `check`."""
    learned = "\n".join(turns.text[start:end] for start, end in spans)
    at = 0
    for i in wanted:
        for word in (word for part in _parts(turns.messages[i]) for word in part.words):
            found = learned.find(word, at)
            if found < 0 or len(word) < _TELLING:
                for each in wanted:
                    _check(turns, each, "")
                return
            at = found + len(word)


def _check(turns: Turns, i: int, learned: str) -> None:
    parts = list(_parts(turns.messages[i]))
    lost = [part.name for part in parts if not _fills(turns, part, learned) and not _is_written(turns, i, part)]
    if "tool calls" in lost or (lost and len(lost) == len(parts)):
        what = "tool calls" if "tool calls" in lost else "answer"
        shown = repr(learned.replace(BREAK, "")[:60]) if learned else "nothing of it"
        raise UserError(
            f"the chat template does not write the {what} of messages[{i}], so that {shown} would be learned in their "
            "place: set data.chat_template to one that does, or mark the message with loss: false"
        )
    for name in lost:
        turns.note(f"the chat template does not write the {name} of some answers, only what is beside them")


def _fills(turns: Turns, part: _Words, learned: str) -> bool:
    """Return whether a learned text plainly holds a part."""
    if all(len(word) >= _TELLING and word in learned for word in part.words):
        return True
    before, word, behind = learned.strip().partition(part.words[0])
    return bool(word) and len(part.words) == 1 and not before and behind.strip() in ("", *turns.tokenizer.control)


def _is_written(turns: Turns, i: int, part: _Words) -> bool:
    """Return whether another text is learned with other words in a part's place."""
    try:
        return turns.learned([*turns.messages[:i], part.otherwise, *turns.messages[i + 1 :]]) != turns.learned()
    except UserError:  # the template reads the words, if only to refuse others
        return True


def _parts(message: dict[str, Any]) -> Iterator[_Words]:
    content, other = (message.get("content") or "").strip(), other_words(message)
    before, _, answer = content.rpartition("</think>")
    if answer.strip():
        yield _Words("content", [content], message | {"content": content[: len(content) - len(answer)] + other})
    if thoughts := before.rpartition("<think>")[2].strip():
        yield _Words("thoughts", [thoughts], message | {"content": content.replace(thoughts, other, 1)})
    if message.get("tool_calls"):
        functions = [call.get("function", call) for call in message["tool_calls"]]
        renamed = [{"function": f | {"name": f"{f['name']}_{other}"}} for f in functions]
        calls = [call | new for call, new in zip(message["tool_calls"], renamed, strict=True)]
        yield _Words("tool calls", [f["name"] for f in functions], message | {"tool_calls": calls})
    for name in FIELDS:
        if isinstance(message.get(name), str) and message[name].strip():
            others = {name: other for name in FIELDS if name in message}
            yield _Words("thoughts", [message[name].strip()], message | others)
            return
