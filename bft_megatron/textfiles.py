"""Reading the user's text and JSON files; whatever is wrong with one is a UserError that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bft_megatron.errors import FieldError, UserError, reading


def read_text(path: Path, field: str = "") -> str:
    """Return the text of a UTF-8 file, with or without a byte order mark.

    Args:
        field: the recipe's field that names the file.

    Raises:
        UserError: the file cannot be read; a FieldError if a field names it.
    """
    with reading(str(path), field):
        return path.read_text(encoding="utf-8-sig")


def read_object(path: Path, field: str = "") -> dict[str, Any]:
    """Return the JSON object in a file. Raises as `read_text`, and if the file holds anything else."""
    text = read_text(path, field)
    with reading(str(path), field):
        try:
            found = json.loads(text)
        except json.JSONDecodeError as e:
            raise _refused(f"{path}:{e.lineno}", f"not JSON: {e.msg}", field) from None
    if not isinstance(found, dict):
        raise _refused(str(path), "must be a JSON object", field)
    return found


def _refused(place: str, message: str, field: str) -> UserError:
    return FieldError(field, f"{place}: {message}") if field else UserError(message, place)
