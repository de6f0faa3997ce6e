"""Loading a model folder's tokenizer and chat template. `chat_tokenizer` renders with them.

Loading takes 0.7 s and does not import torch: it calls, by name, transformers' own reader of `tokenizer.json`, or of
SentencePiece's `tokenizer.model` if there is no such file. (`AutoTokenizer` imports torch, 3 s, to look up a class that
neither needs.)
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from bft_megatron.conversations import known_templates
from bft_megatron.conversations.chat_tokenizer import BREAK, ChatTokenizer
from bft_megatron.conversations.template_limits import DEFAULT, Limits, TemplateFault
from bft_megatron.conversations.templates import Template
from bft_megatron.errors import FieldError, UserError

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*chat_template*",
    "additional_chat_templates/*",
    "vocab*",
    "merges.txt",
)


def load(
    folder: str | Path,
    chat_template: str | None = None,
    limits: Limits = DEFAULT,
    variables: dict[str, Any] | None = None,
) -> ChatTokenizer:
    """Load the tokenizer and chat template of a Hugging Face model folder, from local files, without running its code.

    Args:
        chat_template: Jinja file, the name of one of the tokenizer's templates, or one of `known_templates`, whichever
            there is first; None: the tokenizer's default.
        limits: what it may take to compile the template.
        variables: further variables of the template, for every conversation.

    Raises:
        UserError: no such folder, no readable tokenizer in it, no chat template, one that cannot be compiled, or a
            well-known one whose control tokens the tokenizer lacks.
    """
    from transformers import PreTrainedTokenizerFast

    if not Path(folder).is_dir():
        raise FieldError("model", f"no folder {folder}")
    _check_sentencepiece(Path(folder))
    try:
        loaded = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as e:  # the library raises plain Exception for a broken tokenizer.json
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(
            f"no tokenizer that can be read (tokenizer.json, tokenizer.model): {reason}", str(folder)
        ) from None
    template, origin = _template(loaded, folder, chat_template), chat_template or str(folder)
    _check_syntax(template, origin, limits)
    backend = loaded.backend_tokenizer
    added = backend.get_added_tokens_decoder().values()
    written = known_templates.control_tokens(template)
    if missing := [token for token in written if token not in {token.content for token in added}]:
        raise FieldError(
            "data.chat_template",
            f"{origin} writes {', '.join(missing)}, no control token of this tokenizer: choose a template whose tokens "
            "the model knows",
        )
    control = tuple({token.content: None for token in added if token.special} | dict.fromkeys(written))
    backend.no_truncation()
    backend.no_padding()
    given = loaded.special_tokens_map | (variables or {})
    return ChatTokenizer(backend, _broken(backend), template, given, control, origin)


def _check_sentencepiece(folder: Path) -> None:
    """Raise UserError if the installed transformers would not give SentencePiece's own tokens."""
    from transformers import __version__

    if (folder / "tokenizer.json").exists() or not (folder / "tokenizer.model").exists():
        return
    if Version(__version__) < Version("5.24"):
        raise UserError(
            f"has a tokenizer.model alone, of which transformers {__version__} makes other tokens than SentencePiece: "
            'pip install "transformers>=5.24", or save a tokenizer.json',
            str(folder),
        )


def _broken(backend: tokenizers.Tokenizer) -> tuple[int, ...]:
    """Return the tokens of `BREAK`.

    These are its bytes if the tokenizer falls back to bytes, as SentencePiece's do; otherwise a special token added
    here. (SentencePiece's would begin a new word after an added token, with a space that is not in the text.)
    """
    from tokenizers import AddedToken

    by_bytes = [backend.token_to_id(f"<0x{byte:02X}>") for byte in BREAK.encode()]
    if backend.encode(BREAK, add_special_tokens=False).ids[-len(by_bytes) :] == by_bytes:
        return tuple(token for token in by_bytes if token is not None)
    backend.add_special_tokens([AddedToken(BREAK, special=True, normalized=False)])
    added = backend.token_to_id(BREAK)
    assert added is not None, "it has just been added"
    return (added,)


def _template(loaded: PreTrainedTokenizerFast, folder: str | Path, chosen: str | None) -> str:
    names = sorted(loaded.chat_template) if isinstance(loaded.chat_template, dict) else []
    if chosen is None or (chosen in names and not Path(chosen).is_file()):
        return _own_template(loaded, folder, chosen, names)
    if chosen in known_templates.NAMES and not Path(chosen).is_file():
        return known_templates.read(chosen)
    try:
        return Path(chosen).read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        has = f"the tokenizer's are {', '.join(names)}" if names else "the tokenizer names none"
        reason = getattr(e, "strerror", None) or "not UTF-8"
        raise FieldError(
            "data.chat_template",
            f"{chosen} is no template's name ({has}), and no file: {reason}; well-known names are "
            f"{', '.join(known_templates.NAMES)}",
        ) from None


def _own_template(loaded: PreTrainedTokenizerFast, folder: str | Path, chosen: str | None, names: list[str]) -> str:
    try:
        template: str = loaded.get_chat_template(chosen)
    except ValueError:
        one_of = names or known_templates.NAMES
        hint = f"set data.chat_template to one of {', '.join(one_of)}"
        if not names:
            hint = (
                f"base models often come without: {hint}, or to a Jinja file, such as the chat_template.jinja of the "
                "model's instruction-tuned sibling"
            )
        raise UserError(f"the tokenizer has no chat template of its own; {hint}", str(folder)) from None
    return template


def _check_syntax(template: str, origin: str, limits: Limits) -> None:
    from jinja2 import TemplateSyntaxError

    try:
        with limits.held():
            Template(template)
    except TemplateSyntaxError as e:
        raise FieldError("data.chat_template", f"{origin}, line {e.lineno} of the template: {e.message}") from None
    except TemplateFault as e:
        raise TemplateFault(str(e), origin) from None


def fingerprint(folder: str | Path, chat_template: str | None = None) -> str:
    """Return a hash of all files that the tokenizer and template are made of, without loading them."""
    digest = hashlib.sha256()
    paths = {path for pattern in _FILES for path in Path(folder).glob(pattern) if path.is_file()}
    for path in sorted(paths):
        digest.update(f"{path.name}:{path.stat().st_size}:".encode() + path.read_bytes())
    if chat_template is not None:
        file = Path(chat_template)
        name = chat_template + (known_templates.read(chat_template) if chat_template in known_templates.NAMES else "")
        kind, chosen = ("file", file.read_bytes()) if file.is_file() else ("name", name.encode())
        digest.update(f"{kind}:{len(chosen)}:".encode() + chosen)
    return digest.hexdigest()
