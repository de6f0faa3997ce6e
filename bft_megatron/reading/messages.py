"""Reading the messages of a row, by the names that its format gives to their fields and roles."""

from __future__ import annotations

from typing import Any

from bft_megatron.errors import UserError
from bft_megatron.reading import calls, unseen
from bft_megatron.reading.values import parsed, shown, text

Messages = list[dict[str, Any]]

CALL = "function_call"
"""ShareGPT's role of an assistant turn whose text is a function call as JSON, and the field of OpenAI's old calls."""

SYSTEMS = ("system", "developer")
"""Roles of a message that instructs the model before the conversation."""

ROLES = {role: role for role in (*SYSTEMS, "user", "assistant", "tool")} | {"function": "tool"}
"""Roles of OpenAI's messages -> those of a chat template; `function` is the older name of `tool`."""

ALIASES = ROLES | {CALL: CALL, "human": "user", "gpt": "assistant", "observation": "tool"}
"""Roles of ShareGPT's messages -> those of a chat template."""

SUPERVISED = "\0supervised"
"""Marks a message that is not supervised, until the conversation is built."""


def read(value: Any, columns: dict[str, str], roles: dict[str, str], where: str) -> Messages:
    """Return the messages that a list holds, or JSON text of one, as in a table's cell.

    Args:
        columns: the names of the messages' `role` and `content`.
        roles: the format's roles -> those of a chat template.

    Raises:
        UserError: names the message and the field at fault.
    """
    if isinstance(value, str):
        value = parsed(value, list, where)
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
        raise UserError(f"must be one of {names}, not {shown(role)}", f"{where}.{role_name}")
    role, content = roles[role], message.get(content_name)
    made = {k: v for k, v in message.items() if v is not None and k not in (role_name, content_name, "weight", "loss")}
    if made.get("tool_calls") in ([], "", "[]"):  # as some write that there are none
        del made["tool_calls"]
    unseen.check_media(made, where)
    old_call = parsed(made.pop(CALL, None), dict, f"{where}.{CALL}")
    if role == CALL:
        made["tool_calls"], role, content = calls.from_text(content, f"{where}.{content_name}"), "assistant", None
    elif old_call and "tool_calls" not in made:
        made["tool_calls"] = calls.read([old_call], f"{where}.{CALL}")
    elif "tool_calls" in made:
        made["tool_calls"] = calls.read(made["tool_calls"], f"{where}.tool_calls")
    supervised = _is_supervised(message, where)
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.{content_name}[{i}]") for i, part in enumerate(content))
    calling = bool(made.get("tool_calls"))
    if content is not None or not calling:
        must_speak = role == "assistant" and supervised and not calling
        content = text(content, f"{where}.{content_name}", answer=must_speak)
    return {"role": role, "content": content, **made, **({} if supervised else {SUPERVISED: False})}


def _is_supervised(message: dict[str, Any], where: str) -> bool:
    """Return whether a message may be supervised; `weight: 0` or `loss: false` keeps it as context only."""
    weight, loss = message.get("weight"), message.get("loss")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise UserError(f"must be 0 or 1, not {shown(weight)}: a part of a weight is the row's", f"{where}.weight")
    if loss is not None and not isinstance(loss, bool):
        raise UserError(f"must be true or false, not {shown(loss)}", f"{where}.loss")
    return weight != 0 and loss is not False


def _part(part: Any, where: str) -> str:
    """Return the text of one of OpenAI's content parts; other kinds of parts are refused."""
    if isinstance(part, dict) and (fault := unseen.unseen_part(part)):
        raise UserError(fault, where)
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else part
        raise UserError(f'must be {{"type": "text", "text": "..."}}, not {shown(kind)}', where)
    return text(part.get("text"), f"{where}.text")
