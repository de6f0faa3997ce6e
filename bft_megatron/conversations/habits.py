"""Finding how a chat template wants to be given tool calls: their arguments, and the content of a message without any.

Some templates write the arguments of a call with `tojson` and want an object; others join them as text, or test that
the content `is none`. A wrong form raises no error: text goes through `tojson` twice, an object is printed as Python
prints it, a call is left out. So each template is asked to write a known call in every form, once, and what it writes
is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

from bft_megatron.reading import calls

Messages = list[dict[str, Any]]
Write = Callable[[Messages, list[Any] | None], str | None]
"""Renders messages and tools with the template; None if it refuses them."""

ABSENT = object()
"""A message without a field for its content."""

_ARGUMENTS = {"bft_place": "Oslo", "bft_ways": ["bus"]}
_NAME = "bft_lookup"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Looks up.",
        "parameters": {"type": "object", "properties": {"bft_place": {"type": "string", "description": "Where."}}},
    },
}
_AS_JSON, _AS_WORDS = 2, 1  # how well a form is written


@dataclass(frozen=True)
class Habits:
    """How a template wants tool calls.

    Attributes:
        arguments: `dict` or `str`, the form in which it writes a call's arguments; None if it writes both.
        empty: for a content that is missing, and for one that is "", what stands in its place.
    """

    arguments: type | None
    empty: dict[bool, Any]

    def shaped(self, messages: Messages) -> Messages:
        """Return messages as the template wants them. What has no tool calls stays as it is."""
        given = [self._filled(message) if message.get("tool_calls") else message for message in messages]
        return given if self.arguments is None else calls.with_arguments(given, self.arguments)

    def _filled(self, message: dict[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if content is not None and content.strip():
            return message
        content = self.empty[content is None]
        others = {name: value for name, value in message.items() if name != "content"}
        return others if content is ABSENT else others | {"content": content}

    @property
    def note(self) -> str:
        """A sentence about the form of the arguments."""
        forms: dict[type | None, str] = {dict: "as objects", str: "as JSON text", None: "as the rows have them"}
        return f"has tool calls, whose arguments the chat template is given {forms[self.arguments]}"


def of_template(write: Write) -> Habits:
    """Find the habits of the template that a function renders with.

    A content that is missing is given as transformers gives it (no field), else as null, else as "", whichever of them
    the template writes the call with. If it writes no call in any form, arguments are given as objects beside "", which
    every template takes.
    """
    forms = {form: {empty: _written(write, form, empty) for empty in (ABSENT, None, "")} for form in (dict, str)}
    best = {form: max(written.values()) for form, written in forms.items()}
    if not max(best.values()):
        return Habits(dict, {True: "", False: ""})
    arguments = dict if best[dict] >= best[str] else str
    written = forms[arguments]

    def first(*order: Any) -> Any:
        return max(order, key=lambda empty: written[empty])  # the first of those that are equally well written

    empty = {True: first(ABSENT, None, ""), False: first("", ABSENT, None)}
    if best[dict] == best[str] == _AS_JSON:
        return Habits(None, empty)
    return Habits(arguments, empty)


def _written(write: Write, form: type, empty: Any) -> int:
    """Return how well the template writes a call with its arguments in a form and without content; 0 for not at all."""
    best = 0
    for talk, tools in product((_talk(form, empty)[:2], _talk(form, empty)), (None, [_TOOL])):
        text = write(talk, tools)
        if text is not None and not (empty is None and _prints_none(write, talk, tools, text)):
            best = max(best, _found(text))
    return best


def _talk(form: type, empty: Any) -> Messages:
    arguments = _ARGUMENTS if form is dict else json.dumps(_ARGUMENTS)
    call = {"id": "bftcall00", "type": "function", "function": {"name": _NAME, "arguments": arguments}}
    calling = {"role": "assistant", "tool_calls": [call]} | ({} if empty is ABSENT else {"content": empty})
    answered = {"role": "tool", "content": "There.", "tool_call_id": "bftcall00", "name": _NAME}
    return [{"role": "user", "content": "Where?"}, calling, answered]


def _prints_none(write: Write, talk: Messages, tools: list[Any] | None, text: str) -> bool:
    """Return whether the template prints a content that is null as Python does."""
    with_text = write([talk[0], talk[1] | {"content": ""}, *talk[2:]], tools)
    return with_text is not None and text.count("None") > with_text.count("None")


def _found(text: str) -> int:
    if _NAME not in text or str(_ARGUMENTS) in text:  # as Python prints them
        return 0
    decoder = json.JSONDecoder()
    for at in (at for at, character in enumerate(text) if character == "{"):
        try:
            if decoder.raw_decode(text, at)[0] == _ARGUMENTS:
                return _AS_JSON
        except ValueError:
            continue
    return _AS_WORDS if all(word in text for word in ("bft_place", "Oslo", "bft_ways", "bus")) else 0
