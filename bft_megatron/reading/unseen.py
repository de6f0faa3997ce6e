"""Rows that a text model must not learn from as they are: with images, video or audio, or with a bad answer.

`formats` asks before it reads a row, so that nothing of such a row is learned as if it were all.
"""

from __future__ import annotations

import re
from typing import Any

from bft_megatron.errors import UserError

_MEDIUM = re.compile(r"(image|video|audio)s?(_?[0-9]+|_(url|path|file)s?)?", re.IGNORECASE)
"""Names of fields that hold a medium."""

_PAIR = ("chosen", "rejected")
_ASSISTANT = ("assistant", "gpt")
_OTHERWISE = "or leave such rows out with data.on_error: skip"


def check(row: dict[str, Any], named: set[str], learns: bool, where: str) -> None:
    """Refuse a row that holds what a text model cannot see, a bad answer as such, or a choice between two answers.

    Args:
        named: names of the columns that the source's `columns` gives a meaning: they are what it says.
        learns: whether `columns` says where the answer is: a column beside it is no choice to be made.

    Raises:
        UserError: names the column, and what to do.
    """
    check_media({name: value for name, value in row.items() if name not in named}, where)
    for name in ("label", "kto_tag"):
        if name in row and name not in named and _is_false(row[name], name):
            raise UserError(
                "false marks an answer that is not to be learned (KTO): take the column out of the file if it means "
                f"something else, {_OTHERWISE}",
                f"{where}: {name}",
            )
    if not learns and all(isinstance(row.get(name), str | list | dict) and _holds(row[name]) for name in _PAIR):
        way = _way_to_learn(row)
        raise UserError(
            f"a preference, `chosen` over `rejected`: a fine-tune learns answers, not preferences; {way}",
            f"{where}: chosen",
        )


def check_media(fields: dict[str, Any], where: str) -> None:
    """Raise UserError for a field of a row or a message that holds an image, video or audio."""
    for name, value in fields.items():
        if (medium := _MEDIUM.fullmatch(name)) and _holds(value):
            raise UserError(
                f"holds {_some(medium[1])}, which a text model cannot see: take the column out of the file if the text "
                f"is whole without it, {_OTHERWISE}",
                f"{where}: {name}",
            )


def check_placeholders(row: dict[str, Any], texts: list[str], named: set[str], where: str) -> None:
    """Raise UserError for `<image>` in the text of a row with an empty column of images, and so for the other media."""
    for name in row:
        if name in named or not (medium := _MEDIUM.fullmatch(name)):
            continue
        for text in texts:
            if found := re.search(rf"<\|?{medium[1]}(_pad|_?\d+)?\|?>", text, re.IGNORECASE):
                raise UserError(
                    f"is empty, and {found[0]} in the text stands for {_some(medium[1])}: take the column out of the "
                    f"file if {found[0]} is meant as text, {_OTHERWISE}",
                    f"{where}: {name}",
                )


def unseen_part(part: dict[str, Any]) -> str | None:
    """Return why a part of a message's content that is no text is refused; None if it is nothing known."""
    kind = str(part.get("type") or next(iter(part), ""))
    if not re.search("image|video|audio|file|document", kind):
        return None
    return f"a part of the type {kind[:40]}, which a text model cannot see: take it out of the message, {_OTHERWISE}"


def _some(medium: str) -> str:
    return {"image": "an image", "video": "a video", "audio": "audio"}[medium.lower()]


def _holds(value: Any) -> bool:
    """Return whether a value has anything in it: not null, empty, false or 0, nor only such values."""
    if isinstance(value, dict):
        return any(map(_holds, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds, value))
    if isinstance(value, str):  # a cell's, or one that was written without JSON
        return value.strip().lower() not in ("", "[]", "{}", "null", "none", "nan")
    return bool(value) and value == value  # not NaN


def _is_false(value: Any, name: str) -> bool:
    """Return whether a tag of KTO says no: false, in CSV as text; 0 in `kto_tag`, as a `label` it may be a class."""
    is_zero = name == "kto_tag" and value in (0, "0")
    return value is False or is_zero or (isinstance(value, str) and value.strip().lower() == "false")


def _way_to_learn(row: dict[str, Any]) -> str:
    """Return how to learn the chosen answers of such rows."""
    prompt = next(
        (name for name in ("prompt", "instruction", "conversations", "messages") if _holds(row.get(name))), ""
    )
    if _speaker(row["chosen"], 0) not in (None, *_ASSISTANT):  # it begins with the question
        columns = "{messages: chosen}"
    elif prompt and _speaker(row[prompt], -1) in _ASSISTANT:  # the answer is there
        columns = f"{{messages: {prompt}}}"
    elif prompt in ("conversations", "messages"):
        columns = f"{{prompt: {prompt}, response: chosen}}"
    elif prompt:
        columns = "{response: chosen}"
    else:
        return f"write the chosen ones to a file as messages, {_OTHERWISE}"
    return f"to learn the chosen ones, set the source's `columns: {columns}`, {_OTHERWISE}"


def _speaker(messages: Any, at: int) -> str | None:
    """Return the role of a message of a list, or None if there is no such thing."""
    message = messages[at] if isinstance(messages, list) and messages else None
    return (message.get("role") or message.get("from")) if isinstance(message, dict) else None
