"""Reading conversations: JSONL of chat `messages`, every fault named by file, line and field.

Plain Python only, so that a bad file is refused before anything slow is imported. What a conversation becomes is in
`chat`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bft_megatron.errors import FieldError, UserError

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """One line of a source.

    Attributes:
        line: its number in the file, from 1.
        messages: dicts with at least `role` and `content`, at least one of them from the assistant.
        weight: what its sample's weight is multiplied by.
    """

    line: int
    messages: list[dict[str, Any]]
    weight: float


def read(path: str | Path, field: str = "data.train") -> Iterator[Conversation]:
    """Yield the conversations of a JSONL file in order; blank lines are skipped.

    Args:
        path: absolute, or relative to the current directory.
        field: the recipe's field that names the file, for the error when it can't be read.

    Raises:
        UserError: no such file, nothing in it, or a line that is not a conversation, at the first such line.
    """
    empty = True
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    empty = False
                    yield _conversation(line, number, f"{path}:{number}")
    except OSError as e:
        raise FieldError(field, f"cannot read {path}: {e.strerror}") from None
    if empty:
        raise UserError("holds no conversation", str(path))


def check(path: str | Path, field: str = "data.train") -> int:
    """Read a whole source for its faults alone.

    Returns:
        The number of conversations.

    Raises:
        UserError: as `read`.
    """
    return sum(1 for _ in read(path, field))


def _conversation(line: bytes, number: int, where: str) -> Conversation:
    row = _parse(line, where)
    if not isinstance(row, dict):
        raise UserError('must be an object such as {"messages": [...]}', where)
    if "messages" not in row:
        raise UserError("no such field; a line holds a conversation's messages", f"{where}: messages")
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError("must be a list of at least one message", f"{where}: messages")
    for i, message in enumerate(messages):
        _check_message(message, f"{where}: messages[{i}]")
    if all(message["role"] != "assistant" for message in messages):
        raise UserError("no message is the assistant's, so there is nothing to learn", f"{where}: messages")
    return Conversation(number, messages, _weight(row.get("weight", 1.0), f"{where}: weight"))


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise UserError(f"not UTF-8 at byte {e.start + 1} of the line", where) from None
    except json.JSONDecodeError as e:
        raise UserError(f"not JSON: {e.msg} at column {e.colno}", where) from None
    except (RecursionError, ValueError) as e:  # nested too deeply; a number of thousands of digits
        raise UserError(f"not JSON that can be read: {e}", where) from None


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict):
        raise UserError('must be an object such as {"role": "user", "content": "..."}', where)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise UserError(f"must be one of {', '.join(ROLES)}, not {json.dumps(role)[:40]}", f"{where}.role")
    if not isinstance(content, str):
        raise UserError(f"must be text, not {json.dumps(content)[:40]}", f"{where}.content")
    if role == "assistant" and not content.strip():
        raise UserError("an assistant's message must not be empty", f"{where}.content")
    try:
        content.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"half a surrogate pair at character {e.start + 1}", f"{where}.content") from None


def _weight(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"must be a number, not {json.dumps(value)[:40]}", where)
    try:
        weight = float(value)
    except OverflowError:
        weight = math.inf
    if not math.isfinite(weight) or weight < 0:
        raise UserError("must be finite and not negative", where)
    return weight
