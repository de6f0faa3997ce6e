"""A model folder's tokenizer and chat template. Which tokens of a conversation are learned is in `chat`.

Loading costs 0.7 s and no torch: it is transformers' own reader of `tokenizer.json`, asked for by name.
(`AutoTokenizer` imports torch, 3 s, to look for a class that is only needed where there is no such file.)
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bft_megatron.errors import FieldError, UserError

if TYPE_CHECKING:
    import tokenizers

BREAK = "\ufdd0"
"""Put inside the control tokens that a message's text spells out: a character that Unicode reserves for a program's own
use. It is a token of its own, dropped after tokenisation, so that the text keeps its characters and stays text."""

_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*", "merges.txt")


@dataclass(frozen=True)
class ChatTokenizer:
    """A fast tokenizer with its chat template.

    Attributes:
        backend: the tokenizer, with `BREAK` as one more token. To be asked for no tokens around a text: the template
            writes what begins a text, which would else be doubled.
        template: Jinja source.
        variables: what the template sees beside the messages: `bos_token`, `eos_token`, ...
        control: the control tokens, such as <|im_end|>, as text.
    """

    backend: tokenizers.Tokenizer
    template: str
    variables: dict[str, str]
    control: tuple[str, ...]

    @cached_property
    def has_markers(self) -> bool:
        """Whether the template marks what the assistant says with {% generation %}."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None

    def render(self, messages: list[dict[str, Any]], prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """A conversation as text.

        Args:
            messages: as in a source.
            prompt: end with what opens an answer of the assistant.

        Returns:
            The text, where control tokens that the messages spell out are broken by `BREAK`, and the spans of
            characters inside {% generation %} (none where the template has no such markers).

        Raises:
            UserError: the template refuses the conversation.
        """
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [self.quote(messages)],
                chat_template=self.template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=self.has_markers,
                **self.variables,
            )
        except (TemplateError, TypeError, ValueError) as e:
            raise UserError(f"the model's chat template refuses this conversation: {e}") from None
        return texts[0], spans[0] if spans else []

    def quote(self, value: Any) -> Any:
        """Messages or a part of them, with the control tokens that they spell out broken by `BREAK`, without Nones."""
        if isinstance(value, dict):
            return {key: self.quote(item) for key, item in value.items() if item is not None}
        if isinstance(value, list):
            return [self.quote(item) for item in value]
        if not isinstance(value, str):
            return value
        if BREAK in value:
            raise UserError("the text holds U+FDD0, which is no character")
        while self._spelled.search(value):
            value = self._spelled.sub(lambda match: match[0][0] + BREAK + match[0][1:], value)
        return value

    @cached_property
    def _spelled(self) -> re.Pattern[str]:
        longest_first = sorted((token for token in self.control if len(token) > 1), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def load(folder: str | Path) -> ChatTokenizer:
    """The tokenizer and chat template of a Hugging Face model folder, from local files and without code of the model's.

    Raises:
        UserError: no such folder, no tokenizer that can be read in it, or no chat template.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    if not Path(folder).is_dir():
        raise FieldError("model", f"no folder {folder}")
    try:
        loaded = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as e:  # the library raises plain Exception for a broken tokenizer.json
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(f"no tokenizer that can be read (tokenizer.json): {reason}", str(folder)) from None
    try:
        template = loaded.get_chat_template()
    except ValueError:
        raise UserError(
            "the tokenizer has no chat template; base models often come without: add the chat_template.jinja of the "
            "model's instruction-tuned sibling to the folder",
            str(folder),
        ) from None
    backend = loaded.backend_tokenizer
    control = tuple(token.content for token in backend.get_added_tokens_decoder().values() if token.special)
    backend.no_truncation()
    backend.no_padding()
    backend.add_special_tokens([AddedToken(BREAK, special=True, normalized=False)])
    return ChatTokenizer(backend, template, loaded.special_tokens_map, control)


def fingerprint(folder: str | Path) -> str:
    """A hash of the content of every file that tokenizer and template are made of; reads them, loads nothing."""
    digest = hashlib.sha256()
    paths = {path for pattern in _FILES for path in Path(folder).glob(pattern) if path.is_file()}
    for path in sorted(paths):
        digest.update(f"{path.name}:{path.stat().st_size}:".encode() + path.read_bytes())
    return digest.hexdigest()
