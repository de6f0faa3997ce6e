"""Rendering a conversation and finding its supervised text. Its tokens are in `masks`, the tokenizer in `tokenizers`.

The spans come from the template's {% generation %} markers if it has them, otherwise from `turns`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from bft_megatron.conversations import roles, said
from bft_megatron.conversations.chat_tokenizer import ChatTokenizer
from bft_megatron.conversations.masks import Rendered, tokenise
from bft_megatron.conversations.template_limits import DEFAULT, Limits
from bft_megatron.conversations.templates import Span
from bft_megatron.conversations.turns import Turns
from bft_megatron.reading.formats import Conversation

Supervise = Literal["assistant", "last", "all"]

_TO_LEARN_TURNS = (
    "set data.turns: split for a sample of each answer, or data.supervise: last to learn the last one alone"
)
_TO_LEARN_ALL = (
    "leave out `loss: false` and `weight: 0` of messages, or set data.supervise: assistant and data.turns: split"
)


def encode(
    messages: list[dict[str, Any]], tokenizer: ChatTokenizer, supervise: Supervise
) -> tuple[list[int], list[bool]]:
    """Return a conversation's tokens and, for each, whether it is supervised.

    Answers and their end-of-turn tokens are supervised, the roles' headers never.

    Raises:
        UserError: the template refuses the conversation, does not tell where the assistant's turns lie, or leaves one
            of them out.
    """
    ((tokens, supervised),) = tokenise([render(Conversation(0, messages, 1.0), tokenizer, supervise)], tokenizer)
    return tokens.tolist(), supervised.tolist()


def split(conversation: Conversation) -> Iterator[Conversation]:
    """Yield one conversation per supervised assistant turn: the messages up to it, with only that turn supervised."""
    turns = _assistant(conversation.messages)
    for i in turns:
        if i not in conversation.masked:
            masked = frozenset(j for j in turns if j < i)
            yield replace(conversation, messages=conversation.messages[: i + 1], masked=masked)


def render(
    conversation: Conversation, tokenizer: ChatTokenizer, supervise: Supervise, limits: Limits = DEFAULT
) -> Rendered:
    """Render a conversation and its supervised spans; control tokens spelled out in messages are broken up.

    The messages after the assistant's last turn are left out unless everything is supervised, because they come after
    the last supervised token.

    Raises:
        UserError: as `encode`.
        TemplateFault: the template goes beyond the limits.
    """
    turns = _assistant(conversation.messages)
    end = None if supervise == "all" else turns[-1] + 1
    with limits.held():
        habits = tokenizer.habits(limits)
    known = roles.known_to(tokenizer.template, conversation.messages[:end])
    messages = tokenizer.quote(habits.shaped(known))
    given = tokenizer.quote(conversation.tools), tokenizer.quote(conversation.template)
    with limits.held():
        advice = _TO_LEARN_ALL if supervise == "all" else _TO_LEARN_TURNS
        finder = Turns(messages, given, tokenizer, limits, advice)
        said.check_readable(finder)
        wanted = turns[-1:] if supervise == "last" else turns
        supervised = [i for i in wanted if i not in conversation.masked]
        if supervise == "all":
            spans = finder.without(sorted(conversation.masked))
            said.check_anywhere(finder, supervised, spans)
        elif not tokenizer.has_markers:
            spans = finder.turns(supervised)
            said.check(finder, dict(zip(supervised, spans, strict=True)))
        else:
            spans = _marked(finder, turns, supervised)
    notes = [habits.note] if any(messages[i].get("tool_calls") for i in supervised) else []
    if not said.names_tools(finder.text, given[0]):
        notes.append("has tools, which the chat template does not write")
    return Rendered(finder.text, spans, (*notes, *finder.notes))


def _marked(finder: Turns, turns: list[int], supervised: list[int]) -> list[Span]:
    """Return the spans inside {% generation %} that belong to the supervised turns."""
    marked = finder.marked
    if len(marked) == len(turns):
        of_turn = dict(zip(turns, marked, strict=True))
        said.check(finder, {i: of_turn[i] for i in supervised})
        return [of_turn[i] for i in supervised]
    if supervised != turns:
        begins = [start for start, _ in marked]
        wholes = finder.wholes(supervised)
        inside = {at for whole in wholes for at in range(*(bisect_left(begins, edge) for edge in whole))}
        marked = [marked[at] for at in sorted(inside)]
    said.check_anywhere(finder, supervised, marked)
    return marked


def _assistant(messages: list[dict[str, Any]]) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]
