"""The tokenizer's added tokens in the text of messages: which may be tokens there, and which are text that was found.

Text stays text by default: it cannot begin or end a turn. A user's own tokens, named in `data.special_tokens`, are
tokens where a message spells them. Added tokens that are not `special`, as Qwen's <tool_call>, are tokens in any text.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from bft_megatron.conversations.chat_tokenizer import BREAK, ChatTokenizer
from bft_megatron.errors import FieldError, shortened

if TYPE_CHECKING:
    from tokenizers import AddedToken

FIELD = "data.special_tokens"

SHOWN = 10
"""Tokens of the tokenizer that a message lists."""


def added_tokens(tokenizer: ChatTokenizer) -> dict[int, AddedToken]:
    """Return the tokenizer's own added tokens by id."""
    decoder: dict[int, AddedToken] = tokenizer.backend.get_added_tokens_decoder()
    return {i: token for i, token in decoder.items() if token.content != BREAK}


def allowing(tokenizer: ChatTokenizer, named: Any) -> ChatTokenizer:
    """Return the tokenizer with the tokens that a recipe's `data.special_tokens` lets text spell.

    Raises:
        FieldError: it is neither a list of the tokenizer's added tokens nor `all`.
    """
    if named is None:
        return tokenizer
    known = [token.content for token in added_tokens(tokenizer).values()]
    if named == "all":
        return replace(tokenizer, allowed=frozenset(known))
    if not isinstance(named, list) or not all(isinstance(token, str) for token in named):
        raise FieldError(FIELD, f"must be a list of tokens, such as [<|a|>, <|b|>], or all, not {shortened(named)}")
    for token in named:
        if token not in known:
            raise FieldError(FIELD, _unknown(token, known))
    return replace(tokenizer, allowed=frozenset(named))


def _unknown(token: str, known: list[str]) -> str:
    close = difflib.get_close_matches(token, known, n=3, cutoff=0.5)
    more = f" and {len(known) - SHOWN:,} more" if len(known) > SHOWN else ""
    has = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(known[:SHOWN])}{more}"
    return (
        f'{shortened(token)} is no added token of the tokenizer; {has} To add one, see "New tokens" in '
        "docs/huggingface.md"
    )


def notes(text: str, tokenizer: ChatTokenizer) -> list[str]:
    """Return a sentence for each control token that a rendered conversation spells in its messages, as text."""
    if BREAK not in text:
        return []
    found = {match[0].replace(BREAK, "") for match in _broken(tokenizer.control).finditer(text) if BREAK in match[0]}
    return [
        f"{token} is in messages and learned as text, not as the control token; if it should be the token, name it in "
        f"{FIELD}"
        for token in sorted(found)
    ]


@lru_cache
def _broken(control: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern of control tokens with `BREAK` anywhere inside them."""
    longest_first = sorted(control, key=len, reverse=True)
    return re.compile("|".join(f"{BREAK}?".join(map(re.escape, token)) for token in longest_first) or r"(?!)")
