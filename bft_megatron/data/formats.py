"""Converting a row of a source to a conversation, for each format of conversations. `sources` finds the files.

Plain Python only. Rendering a conversation is in `chat`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bft_megatron.errors import UserError
from bft_megatron.recipe.limits import Range
from bft_megatron.recipe.sources import COLUMNS, COMMON_COLUMNS, SourceSettings

Messages = list[dict[str, Any]]

WEIGHT = Range(at_least=0, at_most=1_000_000)
"""The largest weight of a row. The sums over a batch stay far within the range of fp32."""

ROLES = ("system", "user", "assistant", "tool")
CALL = "function_call"
"""ShareGPT's role for an assistant turn whose text is a function call as JSON."""

_ALIASES = {role: role for role in (*ROLES, CALL)} | {"human": "user", "gpt": "assistant", "observation": "tool"}


@dataclass(frozen=True)
class Conversation:
    """A row of a source as messages.

    Attributes:
        line: the row's number in the file, from 1.
        messages: dicts with at least `role` and `content`, at least one of them from the assistant.
        weight: factor of the sample's weight.
        masked: indices of the assistant's messages that are not supervised.
        tools: functions that the assistant could call, for the template.
        template: further variables of the template, such as `enable_thinking`.
        file: index of the file among the source's files.
    """

    line: int
    messages: Messages
    weight: float
    masked: frozenset[int] = frozenset()
    tools: list[dict[str, Any]] | None = None
    template: dict[str, Any] = field(default_factory=dict)
    file: int = 0


def conversation(row: Any, source: SourceSettings, line: int, file: int, where: str) -> Conversation:
    """Convert a row to a conversation, by the source's format or, with `auto`, by the row's columns.

    Args:
        row: a JSON value, or the columns of a table.
        where: the row's place, for errors.

    Raises:
        UserError: the row is not a conversation; names the field at fault.
    """
    if not isinstance(row, dict):
        raise UserError('must be an object such as {"messages": [...]}', where)
    name, columns = _format(row, source, where)
    messages = _READERS[name](row, columns, source.roles, where)
    system = row.get(columns["system"])
    if system is not None and system != "" and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": _text(system, f"{where}: {columns['system']}")})
    if all(message["role"] != "assistant" for message in messages):
        place = columns.get("messages", columns.get("response"))
        raise UserError("no message is the assistant's, so there is nothing to learn", f"{where}: {place}")
    masked = frozenset(i for i, message in enumerate(messages) if not message.pop(_SUPERVISED, True))
    template = _parsed(row.get(columns["template"]), dict, f"{where}: {columns['template']}") or {}
    tools = _parsed(row.get(columns["tools"]), list, f"{where}: {columns['tools']}") or None
    weight = _weight(row.get(columns["weight"], 1.0), f"{where}: {columns['weight']}")
    return Conversation(line, messages, weight, masked, tools, template, file)


_SUPERVISED = "\0supervised"  # marks a message that is not supervised, until the conversation is built


def _format(row: dict[str, Any], source: SourceSettings, where: str) -> tuple[str, dict[str, str]]:
    """Return the row's format and the names of its columns."""
    names = [source.format] if source.format != "auto" else list(COLUMNS)
    for name in names:
        columns = {**COLUMNS[name], **COMMON_COLUMNS, **source.columns}
        needed = ["messages"] if "messages" in COLUMNS[name] else ["prompt", "response"]
        if source.format == "auto" and source.columns.keys() & ({"prompt", "response"} - set(needed)):
            continue
        if all(row.get(columns[key]) is not None for key in needed):
            if source.format == "auto" and needed == ["messages"]:
                name = "sharegpt" if _has_field(row[columns["messages"]], "from") else "messages"
                columns = {**COLUMNS[name], "messages": columns["messages"], **COMMON_COLUMNS, **source.columns}
            return name, columns
        missing = next(columns[key] for key in needed if row.get(columns[key]) is None)
        if source.format != "auto":
            raise UserError(f"no such field; the row has {_keys(row)}", f"{where}: {missing}")
    raise UserError(
        f"no such field; a row holds a conversation's messages, or conversations, instruction and output, prompt and "
        f"completion; this one has {_keys(row)}: name them in the source's `columns: {{prompt: ..., response: ...}}`",
        f"{where}: messages",
    )


def _keys(row: dict[str, Any]) -> str:
    shown = ", ".join(map(repr, list(row)[:8]))
    return shown[:200] or "none"


def _has_field(messages: Any, name: str) -> bool:
    return isinstance(messages, list) and bool(messages) and isinstance(messages[0], dict) and name in messages[0]


def _messages(row: dict[str, Any], columns: dict[str, str], roles: dict[str, str], where: str) -> Messages:
    known = {role: role for role in ROLES} | roles
    return _list(row[columns["messages"]], columns, known, f"{where}: {columns['messages']}")


def _sharegpt(row: dict[str, Any], columns: dict[str, str], roles: dict[str, str], where: str) -> Messages:
    return _list(row[columns["messages"]], columns, _ALIASES | roles, f"{where}: {columns['messages']}")


def _pair(row: dict[str, Any], columns: dict[str, str], roles: dict[str, str], where: str) -> Messages:
    """Read a prompt and its response, each text or messages, after the pairs of its history."""
    messages: Messages = []
    history, place = row.get(columns["history"]), f"{where}: {columns['history']}"
    for i, turn in enumerate(_parsed(history, list, place) or []):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise UserError("must be a pair, [question, answer]", f"{place}[{i}]")
        messages += [
            {"role": role, "content": _text(text, f"{place}[{i}][{j}]", answer=j == 1)}
            for j, (role, text) in enumerate(zip(("user", "assistant"), turn, strict=True))
        ]
    for key, role in (("prompt", "user"), ("response", "assistant")):
        value, place = row[columns[key]], f"{where}: {columns[key]}"
        if isinstance(value, list):
            names = {"role": "role", "content": "content"}
            messages += _list(value, names, {r: r for r in ROLES} | roles, place)
            continue
        content = _text(value, place, answer=key == "response")
        query = row.get(columns["query"]) if key == "prompt" else None
        if query is not None and query != "":
            content = "\n".join(filter(None, (content, _text(query, f"{where}: {columns['query']}"))))
        messages.append({"role": role, "content": content})
    return messages


_READERS: dict[str, Callable[[dict[str, Any], dict[str, str], dict[str, str], str], Messages]]
_READERS = {"messages": _messages, "sharegpt": _sharegpt, "alpaca": _pair, "pairs": _pair}


def _list(value: Any, columns: dict[str, str], roles: dict[str, str], where: str) -> Messages:
    if isinstance(value, str):  # a table's cell holds JSON
        value = _parsed(value, list, where)
    if not isinstance(value, list) or not value:
        raise UserError("must be a list of at least one message", where)
    return [_message(message, columns, roles, f"{where}[{i}]") for i, message in enumerate(value)]


def _message(message: Any, columns: dict[str, str], roles: dict[str, str], where: str) -> dict[str, Any]:
    role_name, content_name = columns["role"], columns["content"]
    if not isinstance(message, dict):
        raise UserError(f'must be an object such as {{"{role_name}": "user", "{content_name}": "..."}}', where)
    role = message.get(role_name)
    if not isinstance(role, str) or role not in roles:
        names = ", ".join(roles)
        raise UserError(f"must be one of {names}, not {_shown(role)}", f"{where}.{role_name}")
    role, content = roles[role], message.get(content_name)
    made = {k: v for k, v in message.items() if v is not None and k not in (role_name, content_name, "weight", "loss")}
    if role == CALL:
        made["tool_calls"], role, content = _calls(content, f"{where}.{content_name}"), "assistant", None
    elif "tool_calls" in made:
        made["tool_calls"] = _tool_calls(made["tool_calls"], f"{where}.tool_calls")
    supervised = _is_supervised(message, where)
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.{content_name}[{i}]") for i, part in enumerate(content))
    may_be_empty = bool(made.get("tool_calls")) or not supervised
    if content is None and made.get("tool_calls"):
        content = ""
    content = _text(content, f"{where}.{content_name}", answer=role == "assistant" and not may_be_empty)
    return {"role": role, "content": content, **made, **({} if supervised else {_SUPERVISED: False})}


def _is_supervised(message: dict[str, Any], where: str) -> bool:
    """Return whether a message may be supervised; `weight: 0` or `loss: false` keeps it as context only."""
    weight, loss = message.get("weight"), message.get("loss")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise UserError(f"must be 0 or 1, not {_shown(weight)}: a part of a weight is the row's", f"{where}.weight")
    if loss is not None and not isinstance(loss, bool):
        raise UserError(f"must be true or false, not {_shown(loss)}", f"{where}.loss")
    return weight != 0 and loss is not False


def _part(part: Any, where: str) -> str:
    """Return the text of one of OpenAI's content parts; other kinds of parts are refused."""
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else part
        raise UserError(f'must be {{"type": "text", "text": "..."}}, not {_shown(kind)}', where)
    return _text(part.get("text"), f"{where}.text")


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Convert ShareGPT's text of a call, a JSON object or a list of them, to OpenAI's `tool_calls`."""
    try:
        found = json.loads(_text(value, where, answer=True))
    except (ValueError, RecursionError):
        raise UserError('must be a call as JSON, {"name": ..., "arguments": {...}}', where) from None
    return _tool_calls(
        [{"type": "function", "function": f} for f in (found if isinstance(found, list) else [found])], where
    )


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Check OpenAI's calls and parse arguments given as JSON text, which a template's `tojson` would quote twice."""
    if not isinstance(calls, list):
        raise UserError(f"must be a list of calls, not {_shown(calls)}", where)
    made = []
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(
                'must be {"type": "function", "function": {"name": ..., "arguments": ...}}', f"{where}[{i}]"
            )
        if "arguments" in function:
            place = f"{where}[{i}].function.arguments"
            function = function | {"arguments": _parsed(function["arguments"], dict, place) or {}}
        made.append(
            {**call, "type": "function", "function": function}
            if "function" in call
            else {"type": "function", "function": function}
        )
    return made


def _parsed(value: Any, kind: type, where: str) -> Any:
    """Return a list or an object that a cell holds, parsed if it is JSON text as in tables; None if it is empty."""
    name = "list" if kind is list else "object"
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UserError(f"must be a JSON {name}, not {_shown(value)}", where) from None
    if not isinstance(value, kind):
        raise UserError(f"must be a JSON {name}, not {_shown(value)}", where)
    return value


def _text(value: Any, where: str, *, answer: bool = False) -> str:
    if not isinstance(value, str):
        raise UserError(f"must be text, not {_shown(value)}", where)
    if answer and not value.strip():
        raise UserError("an assistant's message must not be empty", where)
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"half a surrogate pair at character {e.start + 1}", where) from None
    return value


def _weight(value: Any, where: str) -> float:
    if value is None:
        return 1.0
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):  # every CSV cell is text
            raise ValueError
        weight = float(value)
    except ValueError:
        raise UserError(f"must be a number, not {_shown(value)}", where) from None
    except OverflowError:
        weight = math.inf
    if fault := WEIGHT.fault(weight):
        raise UserError(fault, where)
    return weight


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:40]
