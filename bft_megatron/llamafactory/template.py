"""The chat template, and whether it lets the model think."""

from __future__ import annotations

import re
from pathlib import Path

from bft_megatron.conversations import known_templates, tokenizers
from bft_megatron.errors import FieldError, UserError
from bft_megatron.hf.hub import find_model
from bft_megatron.llamafactory.conversion import Conversion

_WELL_KNOWN = {name: name for name in known_templates.NAMES} | {"gemma2": "gemma", "glm4": "glm"}
"""LLaMA-Factory's name of a template -> the name of the same one in `data.chat_template`."""

_WITHOUT_THINKING = "_nothink"
"""End of the names of LLaMA-Factory's templates that let the model answer without a thought."""


def carry(to: Conversion) -> None:
    """Convert `template` and `enable_thinking`."""
    name = to.config.text("template")
    if name:
        _carry_template(to, name)
    if not to.config.flag("enable_thinking", True):
        _switch_off(to, "enable_thinking false")
    elif name.endswith(_WITHOUT_THINKING):
        _switch_off(to, f"template {name}")


def _switch_off(to: Conversion, said: str) -> None:
    field, off = "data.chat_template_kwargs", {"enable_thinking": False}
    to.carry("thinking", said, field, off, f"{field}: enable_thinking false")


def _carry_template(to: Conversion, name: str) -> None:
    """Leave the model its own template; give one without the well-known template of that name, if there is one."""
    model, known = to.config.text("model_name_or_path"), _WELL_KNOWN.get(name)
    folder = _folder(model)
    own = "the model's own chat template"
    if folder is not None and _fault(folder) is None:
        to.show("template", f"template {name}", own)
    elif folder is None and not re.search(r"(?i)[-_.](base|pt)$", model):
        to.show("template", f"template {name}", f"{own}; data.chat_template where it has none")
    elif known is None:
        to.lose("template", "no well-known name here, and the model has none of its own: name a Jinja file in "
                f"data.chat_template, or one of {', '.join(known_templates.NAMES)}")  # fmt: skip
    elif folder is not None and (fault := _fault(folder, known)):
        to.lose("template", fault)
    else:
        to.carry("template", f"template {name}", "data.chat_template", known)


def _folder(model: str) -> Path | None:
    try:
        return find_model(model)
    except FieldError:
        return None


def _fault(folder: Path, template: str | None = None) -> str | None:
    """Return why a model's tokenizer cannot be loaded with a template, by default its own; None if it can."""
    try:
        tokenizers.load(folder, template)
    except UserError as e:
        return e.message if isinstance(e, FieldError) else str(e)
    return None
