"""Rendering a conversation and finding its supervised text. Its tokens are in `masks`, the tokenizer in `tokenizers`.

The spans come from the template's {% generation %} markers if it has them. Otherwise the texts of the conversation up
to each answer and again including it are compared with the whole; if both begin it, the text between them is the turn.
They are rendered one by one or, where `templates` can show all of them in one run, taken from that.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from bft_megatron.data import calls
from bft_megatron.data.formats import Conversation
from bft_megatron.data.masks import Rendered, tokenise
from bft_megatron.data.template_limits import DEFAULT, Limits
from bft_megatron.data.templates import Beginnings, Span
from bft_megatron.data.tokenizers import BREAK, ChatTokenizer
from bft_megatron.errors import UserError

Supervise = Literal["assistant", "last", "all"]

MANY = 5
"""Turns from which on all beginnings of a conversation are found in one run; fewer are rendered faster one by one."""

MOST = 20_000_000
"""Messages that are rendered for one conversation, one beginning after the other: a minute's work."""


def encode(
    messages: list[dict[str, Any]], tokenizer: ChatTokenizer, supervise: Supervise
) -> tuple[list[int], list[bool]]:
    """Return a conversation's tokens and, for each, whether it is supervised.

    Answers and their end-of-turn tokens are supervised, the roles' headers never.

    Raises:
        UserError: the template refuses the conversation, or doesn't tell where the assistant's turns lie.
    """
    ((tokens, supervised),) = tokenise([render(Conversation(0, messages, 1.0), tokenizer, supervise)], tokenizer)
    return tokens.tolist(), supervised.tolist()


def split(conversation: Conversation) -> Iterator[Conversation]:
    """Yield one conversation per supervised assistant turn: the messages up to it, with only that turn supervised."""
    turns = _assistant(conversation.messages)
    for i in turns:
        if i not in conversation.masked:
            masked = frozenset(j for j in turns if j < i)
            yield replace(conversation, messages=conversation.messages[: i + 1], masked=masked)


def render(
    conversation: Conversation, tokenizer: ChatTokenizer, supervise: Supervise, limits: Limits = DEFAULT
) -> Rendered:
    """Render a conversation and its supervised spans; control tokens spelled out in messages are broken up.

    The messages after the assistant's last turn are left out unless everything is supervised, because they come after
    the last supervised token.

    Raises:
        UserError: as `encode`.
        TemplateFault: the template goes beyond the limits.
    """
    renderer = _Renderer(conversation, tokenizer, limits)
    with limits.held():
        return renderer.render(conversation.masked, supervise)


@dataclass(frozen=True)
class _Part:
    """A text that has its first `shared` characters in common with the whole text, and then `rest`."""

    shared: int
    rest: str

    def __len__(self) -> int:
        return self.shared + len(self.rest)

    def begins(self, text: str) -> bool:
        return text.startswith(self.rest, self.shared)

    def equals(self, other: _Part, whole: str) -> bool:
        return len(self) == len(other) and self.text(whole) == other.text(whole)

    def text(self, whole: str) -> str:
        return whole[: self.shared] + self.rest


class _Renderer:
    """Finds where the turns of a conversation lie in its text."""

    def __init__(self, conversation: Conversation, tokenizer: ChatTokenizer, limits: Limits) -> None:
        messages = [m | {"content": ""} if m.get("content") is None else m for m in conversation.messages]
        self.messages = tokenizer.quote(calls.with_arguments(messages, dict))
        self.given = (tokenizer.quote(conversation.tools), tokenizer.quote(conversation.template))
        self.tokenizer, self.limits = tokenizer, limits
        self.known: dict[bool, Beginnings | None] = {False: None, True: None}
        self.common = self.rendered = 0

    def render(self, masked: frozenset[int], supervise: Supervise) -> Rendered:
        turns = _assistant(self.messages)
        if supervise != "all":
            self.messages = self.messages[: turns[-1] + 1]
        text, marked = self.text(self.messages)
        if supervise == "all":
            return Rendered(text, _without_spans((0, len(text)), self.turns(sorted(masked), text)))
        supervised = [i for i in (turns if supervise == "assistant" else turns[-1:]) if i not in masked]
        if not self.tokenizer.has_markers:
            return Rendered(text, self.turns(supervised, text))
        if supervised == turns:
            return Rendered(text, marked)
        if len(marked) == len(turns):
            spans = dict(zip(turns, marked, strict=True))
            return Rendered(text, [spans[i] for i in supervised])
        self.learn(supervised, text)
        return Rendered(text, _inside([self.whole(i, text) for i in supervised], marked))

    def text(self, messages: list[dict[str, Any]], prompt: bool = False) -> tuple[str, list[Span]]:
        return self.tokenizer.render(messages, prompt, *self.given, self.limits)

    def learn(self, wanted: list[int], text: str) -> None:
        """Find all beginnings in a run or two, if so many are wanted that this is cheaper than to render them."""
        if len(wanted) < MANY:
            return
        plain, prompted = (
            self.tokenizer.beginnings(self.messages, ask, *self.given, self.limits) for ask in (False, True)
        )
        if plain and plain.text == text:
            self.known[False] = plain
        if prompted:
            self.known[True], self.common = prompted, _common(prompted.text, text)

    def turns(self, wanted: list[int], text: str) -> list[Span]:
        self.learn(wanted, text)
        return [self.turn(i, text) for i in wanted]

    def turn(self, i: int, text: str) -> Span:
        """Return the supervised span of turn i: from after its header to the end of its end-of-turn token."""
        opened, closed = self.opening(i, text), self.before(i + 1, text)
        self.check(i, opened, text)
        self.check(i, closed, text)
        end = len(closed)
        while end and text[end - 1].isspace():
            end -= 1
        return len(opened), end if text.endswith(self.tokenizer.control, 0, end) else len(closed)

    def whole(self, i: int, text: str) -> Span:
        """Return the span of turn i with its header."""
        edges = self.before(i, text), self.before(i + 1, text)
        for edge in edges:
            self.check(i, edge, text)
        return len(edges[0]), len(edges[1])

    def before(self, i: int, text: str, prompt: bool = False) -> _Part:
        """Return the text of the first i messages."""
        if not prompt and i in (0, len(self.messages)):
            return _Part(len(text) if i else 0, "")
        known = self.known[prompt]
        if known is None or i not in known.ends:
            return _Part(0, self.one(self.messages[:i], prompt))
        end = known.ends[i]
        shared = min(end, self.common if prompt else end)
        return _Part(shared, known.text[shared:end] + known.rest)

    def one(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        """Render one beginning, or another conversation of its length, by itself."""
        self.rendered += len(messages)
        if self.rendered > MOST:
            raise UserError(
                f"has {len(self.messages):,} messages, and with this chat template the answers' places are found only "
                "by rendering the conversation up to each: cut it, or set data.supervise: last to learn the last "
                "answer alone"
            )
        return self.text(messages, prompt)[0]

    def opening(self, i: int, text: str) -> _Part:
        """Return the text before turn i followed by the turn's header.

        This is the template's text with `add_generation_prompt`. If the template ignores that, or if nothing stands
        before the turn, the header is the longest prefix that two turns with different content share.
        """
        messages = self.messages
        if i:
            opened = self.before(i, text, prompt=True)
            # If the answer follows directly, the header is included, and the text without it need not be rendered.
            answer = self.tokenizer.asks and messages[i]["content"].strip()
            if answer and text.startswith(answer, len(opened)):
                return opened
            if not opened.equals(self.before(i, text), text):
                return opened
        one, other = (self.one([*messages[:i], {"role": "assistant", "content": said}]) for said in "01")
        header = one[: _common(one, other)]
        return _Part(0, header[: _common(header, text)])  # a turn with a tool call may have another header, or none

    def check(self, i: int, part: _Part, text: str) -> None:
        if not part.begins(text):
            raise UserError(_difference(i, len(self.messages), part.text(text), text))


def _inside(wholes: list[Span], spans: list[Span]) -> list[Span]:
    """Return the spans that begin inside one of `wholes`; both are in order."""
    begins = [start for start, _ in spans]
    inside = {at for whole in wholes for at in range(*(bisect_left(begins, edge) for edge in whole))}
    return [spans[at] for at in sorted(inside)]


def _assistant(messages: list[dict[str, Any]]) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def _without_spans(whole: Span, spans: list[Span]) -> list[Span]:
    edges = [whole[0], *(edge for span in spans for edge in span), whole[1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _common(a: str, b: str) -> int:
    """Return the length of the longest common prefix."""
    return bisect_left(range(1, min(len(a), len(b)) + 1), True, key=lambda n: a[:n] != b[:n])


def _difference(i: int, n: int, part: str, text: str) -> str:
    at = _common(part, text)
    shown = [repr(t[max(0, at - 30) : at + 40].replace(BREAK, "")) for t in (part, text)]
    ways = (
        "set data.turns: split for a sample of each answer, or data.supervise: last to learn the last one alone"
        if i + 1 < n
        else "add {% generation %} markers to the template and name its file in data.chat_template"
    )
    return (
        f"the chat template writes the conversation up to messages[{i}] differently once all {n} messages are there, "
        f"so that the place of the answer is unknown: {shown[0]} became {shown[1]}; {ways}"
    )
