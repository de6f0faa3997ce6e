"""Finding where the turns of a conversation lie in its text, for a chat template that does not mark them.

The texts of the conversation up to a turn and again including it are compared with the whole; if both begin it, the
text between them is the turn. They are rendered one by one or, where `templates` can show all of them in one run, taken
from that. The header of a turn is what the template writes as its generation prompt or, where the turn does not begin
with that, what another answer's text has in common with it.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

from bft_megatron.conversations import thoughts
from bft_megatron.conversations.chat_tokenizer import BREAK, ChatTokenizer
from bft_megatron.conversations.template_limits import Limits, TemplateFault
from bft_megatron.conversations.templates import Beginnings, Span
from bft_megatron.errors import UserError

MANY = 5
"""Turns from which on all beginnings of a conversation are found in one run; fewer are rendered faster one by one."""

MOST = 20_000_000
"""Messages that are rendered for one conversation, one beginning after the other: a minute's work."""

_ASKS = r"add_generation_prompt"
_LOOKS_AHEAD = r"loop\.(last|revindex|nextitem|length)|messages\[-1\]|messages\s*\|\s*(length|last)|\[::-1\]"


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


class Turns:
    """The text of a conversation, and the places of its turns.

    Args:
        messages: in the form that the template wants, quoted.
        given: functions that the assistant could call, and variables of the template.
        advice: what to do where the template writes earlier turns differently once later ones are there.

    Attributes:
        text: what the template writes for the conversation.
        marked: the spans of it inside {% generation %}.
        notes: sentences for `prepare` about how the turns were found.
    """

    def __init__(
        self,
        messages: list[dict[str, Any]],
        given: tuple[Any, Any],
        tokenizer: ChatTokenizer,
        limits: Limits,
        advice: str,
    ) -> None:
        self.messages, self.notes = messages, list[str]()
        self._given, self.tokenizer, self._limits, self._advice = given, tokenizer, limits, advice
        self._known: dict[bool, Beginnings | None] = {False: None, True: None}
        self._common = self._rendered = 0
        self.text, self.marked = self._render(messages)

    def turns(self, wanted: list[int]) -> list[Span]:
        """Return the span of each turn: from after its header to the end of its end-of-turn token.

        Raises:
            UserError: the template does not tell where the turns lie.
        """
        self._learn(wanted)
        return [self._turn(i) for i in wanted]

    def wholes(self, wanted: list[int]) -> list[Span]:
        """Return the span of each turn with its header. Raises UserError as `turns`."""
        self._learn(wanted)
        return [(len(self._checked(i, i)), len(self._checked(i, i + 1))) for i in wanted]

    def without(self, unwanted: list[int]) -> list[Span]:
        """Return the spans between the turns that are not wanted. Raises UserError as `turns`."""
        edges = [0, *(edge for span in self.turns(unwanted) for edge in span), len(self.text)]
        return list(zip(edges[::2], edges[1::2], strict=True))

    def learned(self, messages: list[dict[str, Any]] | None = None) -> str:
        """Return the text that may be learned from a conversation of as many messages, or from this one."""
        text, marked = (self.text, self.marked) if messages is None else self._one(messages)
        return "\n".join(text[start:end] for start, end in marked) if self.tokenizer.has_markers else text

    def note(self, sentence: str) -> None:
        """Add a note, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def _render(self, messages: list[dict[str, Any]], prompt: bool = False) -> tuple[str, list[Span]]:
        return self.tokenizer.render(messages, prompt, *self._given, self._limits)

    @property
    def _variables(self) -> dict[str, Any]:
        return self._given[1] or {}

    def _learn(self, wanted: list[int]) -> None:
        """Find all beginnings in a run or two, if so many are wanted that this is cheaper than to render them."""
        if len(wanted) < MANY:
            return
        plain, prompted = (
            self.tokenizer.beginnings(self.messages, ask, *self._given, self._limits) for ask in (False, True)
        )
        if plain and plain.text == self.text:
            self._known[False] = plain
        if prompted:
            self._known[True], self._common = prompted, common(prompted.text, self.text)

    def _turn(self, i: int) -> Span:
        closed = self._checked(i, i + 1)
        opened, end = self._opening(i, closed), len(closed)
        while end > opened and self.text[end - 1].isspace():
            end -= 1
        if note := thoughts.note_of_empty(self.text, opened, end, self.tokenizer.template):
            self.note(note)
        return opened, end if self.text.endswith(self.tokenizer.control, opened, end) else len(closed)

    def _checked(self, i: int, end: int) -> _Part:
        """Return the text of the first `end` messages, with which the whole text begins; it is an edge of turn i."""
        part = self._before(end)
        if not part.begins(self.text):
            raise self._differs(i, part, _LOOKS_AHEAD)
        return part

    def _before(self, i: int, prompt: bool = False) -> _Part:
        """Return the text of the first i messages."""
        if not prompt and i in (0, len(self.messages)):
            return _Part(len(self.text) if i else 0, "")
        known = self._known[prompt]
        if known is None or i not in known.ends:
            return _Part(0, self._one(self.messages[:i], prompt)[0])
        end = known.ends[i]
        shared = min(end, self._common if prompt else end)
        return _Part(shared, known.text[shared:end] + known.rest)

    def _one(self, messages: list[dict[str, Any]], prompt: bool = False) -> tuple[str, list[Span]]:
        """Render one beginning, or another conversation of its length, by itself."""
        self._rendered += len(messages)
        if self._rendered > MOST:
            raise UserError(
                f"has {len(self.messages):,} messages, and with this chat template the answers' places are found only "
                "by rendering the conversation up to each: cut it, or set data.supervise: last to learn the last "
                "answer alone"
            )
        try:
            return self._render(messages, prompt)
        except TemplateFault:
            raise
        except UserError as e:
            raise UserError(
                f"{e} (as far as messages[{len(messages) - 1}], from which the place of an answer is found; mark an "
                "answer that comes before any question with loss: false)"
            ) from None

    def _opening(self, i: int, closed: _Part) -> int:
        """Return where turn i begins after its header: behind the generation prompt, if the turn begins with that.

        A space that no prompt writes is the answer's own.
        """
        if not i:
            return len(self._header(i, closed))
        if not self.tokenizer.asks:
            header, before = self._header(i, closed), len(self._before(i))
            return before if header[before:].isspace() else len(header)
        opened = self._before(i, prompt=True)
        if opened.begins(self.text) and not opened.equals(self._before(i), self.text):
            return len(opened)
        header = self._header(i, closed)
        self._note_prompt(i, opened, header)
        return len(header)

    def _header(self, i: int, closed: _Part) -> str:
        """Return the text up to and including turn i's header: what it has in common with another answer's text."""
        before, whole = self._checked(i, i), closed.text(self.text)
        answer = {"role": "assistant", "content": other_words(self.messages[i])}
        other = self._one([*self.messages[:i], answer])[0]
        header = whole[: common(whole, other)]
        if len(header) < len(before):
            raise self._differs(i, _Part(0, other), _LOOKS_AHEAD)
        return header

    def _note_prompt(self, i: int, opened: _Part, header: str) -> None:
        """Note that the answer does not begin with all of the generation prompt; raise if it begins with nothing of it.

        A prompt that the template ignores is no fault.
        """
        if opened.equals(self._before(i), self.text):
            return
        asked, before = opened.text(self.text), len(self._before(i))
        if len(header) == before or not asked.startswith(header):
            raise self._differs(i, opened, _ASKS, " with a generation prompt")
        advice = thoughts.of_prompt(self.tokenizer.template, self._variables)
        self.note(
            f"the generation prompt of the chat template ends in {asked[len(header) :]!r}, which it does not write in "
            f"a conversation: the answers are learned as it writes them there{advice}"
        )

    def _differs(self, i: int, part: _Part, cause: str, how: str = "") -> UserError:
        """Return an error that shows where a beginning differs from the whole text.

        Args:
            cause: matches what in the template makes the difference.
            how: how the beginning is written.
        """
        n, other = len(self.messages), part.text(self.text)
        at = common(other, self.text)
        shown = [repr(t[max(0, at - 30) : at + 40].replace(BREAK, "")) for t in (other, self.text)]
        lines = [k for k, line in enumerate(self.tokenizer.template.splitlines(), 1) if re.search(cause, line)]
        where = f" (see line {', '.join(map(str, lines[:5]))} of the template)" if lines else ""
        ways = (
            self._advice + thoughts.of_earlier(self.tokenizer.template, self._variables)
            if i + 1 < n
            else "add {% generation %} markers to the template and name its file in data.chat_template"
        )
        return UserError(
            f"the chat template writes the conversation up to messages[{i}]{how} differently once all {n} messages are "
            f"there, so that the place of the answer is unknown: {shown[0]} became {shown[1]}{where}; {ways}"
        )


def other_words(message: dict[str, Any]) -> str:
    """Return words that begin otherwise than those of a message."""
    texts = [str(message.get(name) or "").strip() for name in ("content", *thoughts.FIELDS)]
    return next(word for word in map(str, range(len(texts) + 1)) if not any(text.startswith(word) for text in texts))


def common(a: str, b: str) -> int:
    """Return the length of the longest common prefix."""
    return bisect_left(range(1, min(len(a), len(b)) + 1), True, key=lambda n: a[:n] != b[:n])
