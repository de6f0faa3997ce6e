"""Converting a row of a source to a conversation, for each format of conversations. `sources` finds the files.

Plain Python only. Rendering a conversation is in `chat`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bft_megatron.errors import UserError
from bft_megatron.reading import messages as reading
from bft_megatron.reading import unseen, values
from bft_megatron.reading.messages import ALIASES, ROLES, SUPERVISED, SYSTEMS, Messages
from bft_megatron.recipe.sources import COLUMNS, COMMON_COLUMNS, SourceSettings


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
        notes: sentences that `prepare` says once of all rows that they are about.
    """

    line: int
    messages: Messages
    weight: float
    masked: frozenset[int] = frozenset()
    tools: list[dict[str, Any]] | None = None
    template: dict[str, Any] = field(default_factory=dict)
    file: int = 0
    notes: tuple[str, ...] = ()


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
    named = set(source.columns.values())
    unseen.check(row, named, bool(source.columns.keys() & {"messages", "response"}), where)
    name, columns = _format(row, source, where)
    messages = _READERS[name](row, columns, source.roles, where)
    unseen.check_placeholders(row, [m["content"] for m in messages if m["content"]], named, where)
    system = row.get(columns["system"])
    if system is not None and system != "" and (not messages or messages[0]["role"] not in SYSTEMS):
        messages.insert(0, {"role": "system", "content": values.text(system, f"{where}: {columns['system']}")})
    if all(message["role"] != "assistant" for message in messages):
        place = columns.get("messages", columns.get("response"))
        raise UserError("no message is the assistant's, so there is nothing to learn", f"{where}: {place}")
    masked = frozenset(i for i, message in enumerate(messages) if not message.pop(SUPERVISED, True))
    template = values.parsed(row.get(columns["template"]), dict, f"{where}: {columns['template']}") or {}
    tools = _tools(row, columns["tools"], where)
    weight = values.weight(row.get(columns["weight"], 1.0), f"{where}: {columns['weight']}")
    return Conversation(line, messages, weight, masked, tools, template, file)


def _tools(row: dict[str, Any], column: str, where: str) -> list[Any] | None:
    """Return the tools in OpenAI's form, also those of its older `functions` and those that are functions alone."""
    tools = values.parsed(row.get(column), list, f"{where}: {column}") or _old_functions(row) or []
    return [
        {"type": "function", "function": tool}
        if isinstance(tool, dict) and "name" in tool and not tool.keys() & {"type", "function"}
        else tool
        for tool in tools
    ] or None


def _old_functions(row: dict[str, Any]) -> list[Any] | None:
    """Return the value of a column `functions` if it holds OpenAI's older schemas and nothing of another kind."""
    try:
        found = values.parsed(row.get("functions"), list, "functions")
    except UserError:
        return None
    schemas = all(isinstance(function, dict) and {"name", "parameters"} <= function.keys() for function in found or [])
    return found if schemas else None


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
    return reading.read(row[columns["messages"]], columns, ROLES | roles, f"{where}: {columns['messages']}")


def _sharegpt(row: dict[str, Any], columns: dict[str, str], roles: dict[str, str], where: str) -> Messages:
    return reading.read(row[columns["messages"]], columns, ALIASES | roles, f"{where}: {columns['messages']}")


def _pair(row: dict[str, Any], columns: dict[str, str], roles: dict[str, str], where: str) -> Messages:
    """Read a prompt and its response, each text or messages, after the pairs of its history."""
    messages: Messages = []
    history, place = row.get(columns["history"]), f"{where}: {columns['history']}"
    for i, turn in enumerate(values.parsed(history, list, place) or []):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise UserError("must be a pair, [question, answer]", f"{place}[{i}]")
        messages += [
            {"role": role, "content": values.text(text, f"{place}[{i}][{j}]", answer=j == 1)}
            for j, (role, text) in enumerate(zip(("user", "assistant"), turn, strict=True))
        ]
    for key, role in (("prompt", "user"), ("response", "assistant")):
        value, place = row[columns[key]], f"{where}: {columns[key]}"
        if isinstance(value, list | dict):
            messages += _listed(value if isinstance(value, list) else [value], roles, place)
            continue
        content = values.text(value, place, answer=key == "response")
        query = row.get(columns["query"]) if key == "prompt" else None
        if query is not None and query != "":
            content = "\n".join(filter(None, (content, values.text(query, f"{where}: {columns['query']}"))))
        messages.append({"role": role, "content": content})
    return messages


def _listed(value: list[Any], roles: dict[str, str], where: str) -> Messages:
    """Read a prompt or a response that is a list of messages, OpenAI's or ShareGPT's."""
    if value and all(isinstance(item, str) for item in value):
        raise UserError("must be text, or messages: of several texts to choose from, write one", where)
    if _has_field(value, "from"):
        return reading.read(value, COLUMNS["sharegpt"], ALIASES | roles, where)
    return reading.read(value, COLUMNS["messages"], ROLES | roles, where)


_READERS: dict[str, Callable[[dict[str, Any], dict[str, str], dict[str, str], str], Messages]]
_READERS = {"messages": _messages, "sharegpt": _sharegpt, "alpaca": _pair, "pairs": _pair}
