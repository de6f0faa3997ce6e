"""Reading the tool calls of an assistant's message."""

from __future__ import annotations

import json
from typing import Any

from bft_megatron.errors import UserError
from bft_megatron.reading.values import parsed, shown, text


def from_text(value: Any, where: str) -> list[dict[str, Any]]:
    """Convert ShareGPT's text of a call, a JSON object or a list of them, to OpenAI's `tool_calls`."""
    try:
        found = json.loads(text(value, where, answer=True))
    except (ValueError, RecursionError):
        raise UserError('must be a call as JSON, {"name": ..., "arguments": {...}}', where) from None
    return read([{"type": "function", "function": f} for f in (found if isinstance(found, list) else [found])], where)


def read(calls: Any, where: str) -> list[dict[str, Any]]:
    """Check OpenAI's calls: a name, and arguments that are an object, or JSON text of one, which stays text.

    Null fields of a call are left out; nulls inside arguments belong to them.
    """
    if not isinstance(calls, list):
        raise UserError(f"must be a list of calls, not {shown(calls)}", where)
    made = []
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(
                'must be {"type": "function", "function": {"name": ..., "arguments": ...}}', f"{where}[{i}]"
            )
        if parsed(function.get("arguments"), dict, f"{where}[{i}].function.arguments") is None:
            function = function | {"arguments": {}}
        function = {name: value for name, value in function.items() if value is not None}
        others = {name: value for name, value in call.items() if value is not None} if "function" in call else {}
        made.append(others | {"type": "function", "function": function})
    return made


def with_arguments(messages: list[dict[str, Any]], form: type) -> list[dict[str, Any]]:
    """Return messages whose calls all have their arguments as objects (`dict`) or as JSON text (`str`).

    What has that form already stays as it is.
    """

    def changed(call: dict[str, Any]) -> dict[str, Any]:
        arguments = call["function"]["arguments"]
        if not isinstance(arguments, form):
            arguments = json.loads(arguments) if form is dict else json.dumps(arguments, ensure_ascii=False)
        return call | {"function": call["function"] | {"arguments": arguments}}

    return [
        message | {"tool_calls": [changed(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]
