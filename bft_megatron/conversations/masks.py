"""Tokenising a rendered conversation and finding its supervised tokens. Its supervised text is found in `chat`.

The loss mask comes from positions, not token ids. A conversation is rendered to text once and tokenised once, and spans
of characters become spans of tokens through the tokenizer's offsets, so that merges at the edges of a span are those of
the whole text. A token that overlaps a span belongs to it, as in transformers' `return_assistant_tokens_mask`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from bft_megatron.conversations.chat_tokenizer import ChatTokenizer
from bft_megatron.conversations.templates import Span

if TYPE_CHECKING:
    from tokenizers import Encoding

_SCANNED = 10_000_000
"""Tokens that are looked through for the spans of a conversation before it pays to search among them."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, with its supervised spans of characters in order, and notes as a `Conversation` has."""

    text: str
    spans: list[Span]
    notes: tuple[str, ...] = ()


def tokenise(rendered: list[Rendered], tokenizer: ChatTokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the tokens, [n] int32, and mask, [n] bool, of each conversation; calls the tokenizer once for all."""
    encodings = tokenizer.backend.encode_batch([r.text for r in rendered], add_special_tokens=False)
    broken = np.array(tokenizer.broken)
    return [_without(broken, np.array(e.ids, np.int32), _mask(e, r)) for e, r in zip(encodings, rendered, strict=True)]


def _mask(encoding: Encoding, rendered: Rendered) -> np.ndarray:
    mask = np.zeros(len(encoding), bool)
    token_at = _searching(encoding) if len(rendered.spans) * len(mask) > _SCANNED else None
    token_at = token_at or partial(_token_at, encoding)
    for start, end in rendered.spans:
        first = token_at(start, end)
        if first is None:  # an empty span, or one of spaces that the tokenizer's offsets leave out
            continue
        after = token_at(end, len(rendered.text))
        if after is None:
            after = len(mask)
        elif (chars := encoding.token_to_chars(after)) is not None and chars[0] < end:
            after += 1
        mask[first:after] = True
    return mask


def _token_at(encoding: Encoding, char: int, stop: int) -> int | None:
    """Return the first token that holds a character of [char, stop), or None. Looks through all tokens."""
    tokens = (encoding.char_to_token(position) for position in range(char, stop))
    return next((token for token in tokens if token is not None), None)


def _searching(encoding: Encoding) -> Callable[[int, int], int | None] | None:
    """Return a `_token_at` that searches instead; None if the tokens do not lie in the order of the text."""
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    tokens = np.flatnonzero(offsets[:, 0] < offsets[:, 1])
    starts, ends = offsets[tokens].T
    if (np.diff(starts) < 0).any() or (np.diff(ends) < 0).any():
        return None

    def token_at(char: int, stop: int) -> int | None:
        k = int(np.searchsorted(ends, char, side="right"))
        return int(tokens[k]) if char < stop and k < len(tokens) and starts[k] < stop else None

    return token_at


def _without(broken: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens and mask without the tokens that spell `BREAK`."""
    if broken[0] not in ids:
        return ids, mask
    maybe = np.flatnonzero(ids == broken[0])
    begins = [at for at in maybe if np.array_equal(ids[at : at + len(broken)], broken)]
    kept = np.ones(len(ids), bool)
    kept[np.add.outer(np.array(begins, int), np.arange(len(broken)))] = False
    return ids[kept], mask[kept]
