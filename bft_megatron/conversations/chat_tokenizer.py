"""A tokenizer with its chat template: rendering conversations, and keeping their text from spelling control tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from bft_megatron.conversations import habits
from bft_megatron.conversations.habits import Habits
from bft_megatron.conversations.template_limits import DEFAULT, Limits, TemplateFault
from bft_megatron.conversations.templates import Beginnings, Inputs, Span, Template
from bft_megatron.errors import UserError

if TYPE_CHECKING:
    import tokenizers

BREAK = "\ufdd0"
"""Inserted into control tokens that a message's text spells out: a character that Unicode reserves for internal use.
Its tokens are dropped after tokenisation, so the text keeps its characters and is not tokenised as a control token."""

DEEPEST = 100
"""Levels of lists and objects in a conversation: macros that follow them need several of Python's 1,000 calls each."""


@dataclass(frozen=True)
class ChatTokenizer:
    """A fast tokenizer with its chat template.

    Attributes:
        backend: the tokenizer. Call it without special tokens: the template already writes what begins a text.
        broken: the tokens of `BREAK`.
        template: Jinja source.
        variables: the template's variables besides the messages: `bos_token`, `eos_token`, ...
        control: the control tokens, such as <|im_end|>, as text.
        origin: the file or the model folder that the template is from, for errors.
        allowed: the control tokens that stay such in a message's text (`special_tokens`).
    """

    backend: tokenizers.Tokenizer
    broken: tuple[int, ...]
    template: str
    variables: dict[str, Any]
    control: tuple[str, ...]
    origin: str = ""
    allowed: frozenset[str] = frozenset()

    @cached_property
    def program(self) -> Template:
        """The template, compiled."""
        return Template(self.template)

    @cached_property
    def size(self) -> int:
        """One more than the largest token id."""
        return 1 + max(token for text, token in self.backend.get_vocab().items() if text != BREAK)

    @cached_property
    def has_markers(self) -> bool:
        """Whether the template marks the assistant's text with {% generation %}."""
        source = re.sub(r"\{#.*?#\}", "", self.template, flags=re.DOTALL)  # without comments
        return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None

    @cached_property
    def asks(self) -> bool:
        """Whether the template has `add_generation_prompt`."""
        return "add_generation_prompt" in self.template

    def habits(self, limits: Limits = DEFAULT) -> Habits:
        """Return how the template wants tool calls; it is asked once."""
        if not self._habits:

            def write(messages: list[dict[str, Any]], tools: list[Any] | None) -> str | None:
                try:
                    return self.render(messages, tools=tools, limits=limits)[0]
                except TemplateFault:
                    raise
                except UserError:
                    return None

            self._habits.append(habits.of_template(write))
        return self._habits[0]

    @cached_property
    def _habits(self) -> list[Habits]:
        return []

    def render(
        self,
        messages: list[dict[str, Any]],
        prompt: bool = False,
        tools: list[Any] | None = None,
        variables: dict[str, Any] | None = None,
        limits: Limits = DEFAULT,
    ) -> tuple[str, list[Span]]:
        """Render a conversation to text.

        Args:
            messages: as in a source; pass untrusted ones through `quote` first.
            prompt: end with the header of an assistant turn.
            tools: functions that the assistant could call.
            variables: further variables of the template.
            limits: of the text's length.

        Returns:
            The text, and the spans of characters inside {% generation %} (none if the template has no such markers).

        Raises:
            UserError: the template refuses the conversation, or it writes more than the limit (TemplateFault).
        """
        with self._refusing():
            text, spans = self.program.render(messages, prompt, self._given(tools, variables), limits)
            text.encode()
        return text, spans

    def beginnings(
        self,
        messages: list[dict[str, Any]],
        prompt: bool = False,
        tools: list[Any] | None = None,
        variables: dict[str, Any] | None = None,
        limits: Limits = DEFAULT,
    ) -> Beginnings | None:
        """Return the texts of a conversation's beginnings, or None if one run does not show them.

        The arguments and errors are those of `render`.
        """
        with self._refusing():
            return self.program.beginnings(messages, prompt, self._given(tools, variables), limits)

    def _given(self, tools: list[Any] | None, variables: dict[str, Any] | None) -> Inputs:
        return Inputs(tools, self.variables | (variables or {}))

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Turn what a template raises into an error of the conversation."""
        from jinja2 import TemplateError

        try:
            yield
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as e:
            reason = (str(e).strip() or type(e).__name__).splitlines()[0]
            raise UserError(f"the chat template refuses this conversation: {reason}") from None

    def quote(self, value: Any, depth: int = 0) -> Any:
        """Return messages, or a part of them, with `BREAK` inside the control tokens they spell."""
        if depth > DEEPEST:
            raise UserError("is nested too deeply")
        if isinstance(value, dict):
            return {self.quote(key): self.quote(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list):
            return [self.quote(item, depth + 1) for item in value]
        if not isinstance(value, str):
            return value
        if BREAK in value:
            raise UserError("the text holds U+FDD0, which is no character")
        while (broken := self._spelled.sub(self._broken, value)) != value:
            value = broken
        return value

    def _broken(self, match: re.Match[str]) -> str:
        token = match[0]
        return token if token in self.allowed else token[0] + BREAK + token[1:]

    @cached_property
    def _spelled(self) -> re.Pattern[str]:
        longest_first = sorted((token for token in self.control if len(token) > 1), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
