"""Masks by position: which tokens of a conversation are learned. Loading and rendering are in `tokenizers`.

The conversation is rendered to text once and tokenised once; spans of characters become spans of tokens through the
tokenizer's offsets, so that merges at their edges are those of the text as a whole. A token that overlaps a span
belongs to it, as in transformers' `return_assistant_tokens_mask`. The spans come from the template's {% generation %}
markers where it has them. Else the conversation is rendered up to each answer and after it: where these texts are
prefixes of the whole, what lies between is the turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bft_megatron.data.tokenizers import BREAK, ChatTokenizer
from bft_megatron.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Encoding

Supervise = Literal["assistant", "last", "all"]
Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the spans of its characters that are learned, in order."""

    text: str
    spans: list[Span]


def encode(
    messages: list[dict[str, Any]], tokenizer: ChatTokenizer, supervise: Supervise
) -> tuple[list[int], list[bool]]:
    """A conversation's tokens, and whether each is learned: answers with their end of turn, never the roles' headers.

    Raises:
        UserError: the template refuses the conversation, or doesn't tell where the assistant's turns lie.
    """
    return tokenise([render(messages, tokenizer, supervise)], tokenizer)[0]


def render(messages: list[dict[str, Any]], tokenizer: ChatTokenizer, supervise: Supervise) -> Rendered:
    """A conversation as text with its learned spans.

    What follows the assistant's last turn is left out unless everything is learned: it comes after all that is learned.

    Raises:
        UserError: as `encode`.
    """
    if supervise == "all":
        text, _ = tokenizer.render(messages)
        return Rendered(text, [(0, len(text))])
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    messages = messages[: turns[-1] + 1]
    text, marked = tokenizer.render(messages)
    if tokenizer.has_markers:
        return Rendered(text, marked if supervise == "assistant" else marked[-1:])
    learned = turns if supervise == "assistant" else turns[-1:]
    return Rendered(text, [_turn(messages, i, text, tokenizer) for i in learned])


def tokenise(rendered: list[Rendered], tokenizer: ChatTokenizer) -> list[tuple[list[int], list[bool]]]:
    """Tokens and mask of many conversations in one call of the tokenizer, which spreads them over its threads."""
    encodings = tokenizer.backend.encode_batch([r.text for r in rendered], add_special_tokens=False)
    broken = tokenizer.backend.token_to_id(BREAK)
    return [_without(broken, e.ids, _mask(e, r)) for e, r in zip(encodings, rendered, strict=True)]


def _turn(messages: list[dict[str, Any]], i: int, text: str, tokenizer: ChatTokenizer) -> Span:
    """Characters of turn i that are learned: from after its header to the end of its end-of-turn token."""
    opened = _opening(messages, i, tokenizer)
    closed = tokenizer.render(messages[: i + 1])[0] if i + 1 < len(messages) else text
    for part in (opened, closed):
        if not text.startswith(part):
            raise UserError(_difference(i, len(messages), part, text))
    trimmed = closed.rstrip()
    return len(opened), len(trimmed) if trimmed.endswith(tokenizer.control) else len(closed)


def _opening(messages: list[dict[str, Any]], i: int, tokenizer: ChatTokenizer) -> str:
    """The text before turn i with the turn's header: what the template writes when asked to let the assistant answer.

    Where it ignores the request, or nothing stands before the turn: what is the same whatever the turn says.
    """
    if i:
        opened, _ = tokenizer.render(messages[:i], prompt=True)
        if opened != tokenizer.render(messages[:i])[0]:
            return opened
    one, other = (tokenizer.render([*messages[:i], messages[i] | {"content": content}])[0] for content in "01")
    return one[: _common(one, other)]


def _common(a: str, b: str) -> int:
    """Length of the longest common prefix."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _difference(i: int, n: int, part: str, text: str) -> str:
    at = _common(part, text)
    shown = [repr(t[max(0, at - 30) : at + 40].replace(BREAK, "")) for t in (part, text)]
    last = "set data.supervise: last to learn the last answer alone"
    return (
        f"the model's chat template writes the conversation up to messages[{i}] differently once all {n} messages are "
        f"there, so that the place of the answer is unknown: {shown[0]} became {shown[1]}; "
        + (last if i + 1 < n else "add {% generation %} markers to it")
    )


def _mask(encoding: Encoding, rendered: Rendered) -> list[bool]:
    mask = [False] * len(encoding.ids)
    for start, end in rendered.spans:
        first = _token_at(encoding, start, end)
        if first is None:  # an empty span, or nothing in it but spaces that the tokenizer's offsets leave out
            continue
        after = _token_at(encoding, end, len(rendered.text))
        if after is None:
            after = len(mask)
        elif encoding.token_to_chars(after)[0] < end:
            after += 1
        mask[first:after] = [True] * (after - first)
    return mask


def _token_at(encoding: Encoding, char: int, stop: int) -> int | None:
    """The first token that holds a character of [char, stop)."""
    tokens = (encoding.char_to_token(position) for position in range(char, stop))
    return next((token for token in tokens if token is not None), None)


def _without(broken: int, ids: list[int], mask: list[bool]) -> tuple[list[int], list[bool]]:
    if broken not in ids:
        return ids, mask
    kept = [i for i, token in enumerate(ids) if token != broken]
    return [ids[i] for i in kept], [mask[i] for i in kept]
