"""Settings of a source of conversations: an item of `data.train` or `data.valid`.

A path alone is short for an item with only a path. `reading.sources` finds the files of a path and reads them.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from bft_megatron.errors import FieldError, shortened
from bft_megatron.recipe.limits import PATH, home_path, limit_of, number

Format = Literal["auto", "messages", "sharegpt", "alpaca", "pairs"]

COLUMNS = {
    "messages": {"messages": "messages", "role": "role", "content": "content"},
    "sharegpt": {"messages": "conversations", "role": "from", "content": "value"},
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output", "history": "history"},
    "pairs": {"prompt": "prompt", "query": "query", "response": "completion", "history": "history"},
}
"""Column of each part by format; for `messages`, `role` and `content` are the fields of a message."""

COMMON_COLUMNS = {"system": "system", "tools": "tools", "weight": "weight", "template": "chat_template_kwargs"}
"""Column of each optional part, which a row of any format may have."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""How a file is compressed, by its last suffix."""


@dataclass(frozen=True)
class SourceSettings:
    """An item of `data.train` or `data.valid`."""

    path: str = field(metadata=PATH)
    """File, glob, folder, id of a data set in the local hub cache, or LLaMA-Factory's dataset_info.json."""
    name: str | None = None
    """Name in reports; with a dataset_info.json, the entry to use. Left out: the last part of the path."""
    weight: float = number(1.0, above=0, at_most=1_000_000)
    """Passes over the source in an epoch: 2 takes each row twice, 0.5 every second row, the rest an epoch later."""
    split: str = "train"
    """Split of a folder or hub data set that has several."""
    subset: str | None = None
    """Subset of a hub data set that has several."""
    rows: str | None = None
    """Rows to use, as a Python slice: `":1000"` the first thousand, `"1000:"` the others. Left out: all."""
    format: Format = "auto"
    """How a row holds a conversation; `auto` recognises it by its columns."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column names that differ from the format's: `{prompt: question, response: answer}`."""
    roles: dict[str, str] = field(default_factory=dict)
    """Role names that differ from the usual ones: `{person: user, machine: assistant}`."""

    @property
    def first_and_end(self) -> tuple[int, int | None]:
        """Index of the first row to use, and the index after the last; None as the latter if `rows` has no end."""
        first, _, end = (self.rows or ":").partition(":")
        return int(first or 0), int(end) if end else None

    @property
    def label(self) -> str:
        """Name of the source in reports."""
        path = Path(self.path)
        return self.name or (path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path).stem or self.path


def source_settings(value: Any, where: str) -> tuple[SourceSettings, ...]:
    """Return the sources in the value of a recipe's field.

    Args:
        value: a path, an item, or a list of both.
        where: the field's name, such as `data.train`.

    Raises:
        FieldError: an item is invalid; the message names it and the fault.
    """
    items = value if isinstance(value, list | tuple) else [value]
    if not items:
        raise FieldError(where, "must name at least one source")
    found = tuple(_item(item, where, f"[{i}]" if len(items) > 1 else "") for i, item in enumerate(items))
    if where == "data.valid" and any(source.weight != 1 for source in found):
        raise FieldError(where, "`weight` is for training: a validation reads every source once")
    names = [source.label for source in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise FieldError(where, f"two sources are called {twice[0]}: give each a `name` of its own")
    if len(found) > 1 and (taken := {"train", "valid"} & set(names)) and where == "data.valid":
        raise FieldError(where, f"{min(taken)} is what the reports call the whole set: choose another `name`")
    return found


def at_home(value: Any) -> Any:
    """Return the value of a recipe's field with `home_path` of every source's path."""
    if isinstance(value, str):
        return home_path(value)
    if isinstance(value, dict) and "path" in value:
        return value | {"path": at_home(value["path"])}
    return [at_home(item) for item in value] if isinstance(value, list) else value


def _item(value: Any, where: str, place: str) -> SourceSettings:
    if isinstance(value, str):
        value = {"path": value}
    if not isinstance(value, dict):
        raise FieldError(where, f"item {place}: must be a path or fields such as {{path: ..., weight: ...}}")

    def wrong(key: str, message: str) -> FieldError:
        return FieldError(where, f"`{place}.{key}`".replace("`.", "`") + f": {message}")

    known = [f.name for f in fields(SourceSettings)]
    for key in value:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            raise wrong(
                shortened(key), f"unknown field; {f'did you mean `{close[0]}`?' if close else ', '.join(known)}"
            )
    value = {key: given for key, given in value.items() if given is not None or key not in ("name", "subset", "rows")}
    for key in ("path", "name", "split", "subset"):
        if key in value and not (isinstance(value[key], str) and value[key]):
            raise wrong(key, f"must be text, not {shortened(repr(value[key]))}")
    if "path" not in value:
        raise wrong("path", "must be given")
    if "rows" in value:
        _check_rows(value["rows"], wrong)
    weight = value.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise wrong("weight", f"must be a number, not {shortened(repr(weight))}")
    for key in ("path", "weight"):
        limit = limit_of(SourceSettings, key)
        if limit is not None and (fault := limit.fault(value.get(key, weight))):
            raise wrong(key, fault)
    if value.get("format", "auto") not in get_args(Format):
        raise wrong("format", f"must be one of {', '.join(get_args(Format))}, not {shortened(repr(value['format']))}")
    for key in ("columns", "roles"):
        names = value.get(key, {})
        if not isinstance(names, dict) or not all(isinstance(n, str) for pair in names.items() for n in pair):
            raise wrong(key, f"must be names such as {{prompt: question}}, not {shortened(repr(names))}")
    _check_columns(value.get("format", "auto"), value.get("columns", {}), wrong)
    return SourceSettings(**{**value, "weight": float(weight)})


def _check_rows(rows: Any, wrong: Any) -> None:
    if not isinstance(rows, str) or not re.fullmatch(r"[0-9]{0,15}:[0-9]{0,15}", rows):
        raise wrong("rows", f"must be first:end in quotes, for example ':1000', not {shortened(repr(rows))}")
    first, _, end = rows.partition(":")
    if end and int(first or 0) >= int(end):
        raise wrong("rows", f"{rows} takes none")


def _check_columns(format_name: str, columns: dict[str, str], wrong: Any) -> None:
    formats = [format_name] if format_name != "auto" else list(COLUMNS)
    known = [*dict.fromkeys(key for name in formats for key in COLUMNS[name]), *COMMON_COLUMNS]
    if unknown := [key for key in columns if key not in known]:
        raise wrong("columns", f"{shortened(unknown[0])} is none of {', '.join(known)}")
