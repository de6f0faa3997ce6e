"""Thoughts before answers: the fields that hold them, and advice on chat templates that write or ask for them."""

from __future__ import annotations

import re
from typing import Any

FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names of a message's field for the thoughts before its answer."""

_EMPTY = re.compile(r"\s*(<think>)?\s*</think>")
_OFF = "data.chat_template_kwargs: {enable_thinking: false}"


def of_prompt(template: str, variables: dict[str, Any]) -> str:
    """Return advice, in brackets, for a generation prompt that goes on further than the answers begin; may be "".

    Args:
        template: its source.
        variables: those that a row gives it.
    """
    if variables.get("enable_thinking") is False and "enable_thinking" in template:
        return " (leave enable_thinking: false out where answers have thoughts)"
    ways = ["thoughts in reasoning_content"] if "reasoning_content" in template else []
    ways += [_OFF] if "enable_thinking" in template else []
    return f" (to learn what follows it, give {' or '.join(ways)})" if ways else ""


def of_earlier(template: str, variables: dict[str, Any]) -> str:
    """Return advice, after another, for a template that drops the thoughts of earlier answers; may be ""."""
    if "preserve_thinking" not in template or variables.get("preserve_thinking"):
        return ""
    return ", or data.chat_template_kwargs: {preserve_thinking: true} to keep the thoughts of all answers"


def note_of_empty(text: str, start: int, end: int, template: str) -> str | None:
    """Return a note if a learned text begins with a thought of no words that the template could leave to the prompt.

    Args:
        text: whose characters [start, end) are learned.
        template: its source.
    """
    if "enable_thinking" not in template or not _EMPTY.match(text, start, end):
        return None
    return (
        "the chat template writes an empty thought before answers without thoughts, and it is learned: the model "
        f"learns not to think where it is asked to; with {_OFF}, or such chat_template_kwargs of their rows, it is "
        "part of the prompt"
    )
