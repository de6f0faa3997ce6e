"""Chat templates by well-known names, a file of `known_jinja` each, written from the models' documented formats."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_CONTROL_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "qwen": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("<s>", "</s>"),  # the first releases wrote [INST] as text
    "gemma": ("<bos>", "<start_of_turn>", "<end_of_turn>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "deepseek3": ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    "glm": ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
    "phi": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "phi4": ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
}  # fmt: skip

NAMES = tuple(_CONTROL_TOKENS)
"""The well-known names."""


@cache
def read(name: str) -> str:
    """Return the Jinja source of a well-known template."""
    return (Path(__file__).parent / "known_jinja" / f"{name}.jinja").read_text(encoding="utf-8")


def control_tokens(template: str) -> tuple[str, ...]:
    """Return the control tokens that a well-known template writes, found by its source; () for any other template."""
    return next((tokens for name, tokens in _CONTROL_TOKENS.items() if read(name) == template), ())
