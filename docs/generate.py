"""Writes the parts of the pages that are generated from the code: `python -m docs.generate`.

docs/recipe.md gets a table for each group of a recipe's fields: names, types, ranges and defaults from the dataclasses,
meanings from the docstrings under the fields. docs/flags.md gets what becomes of every flag of Megatron,
docs/architecture.md the tree of the package, README.md its rooms, each line of these the first sentence of a docstring.
A test holds the pages to the code.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
from dataclasses import MISSING, Field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints
from unittest.mock import patch

from bft_megatron.recipe import flag_groups, flags, limits, schema, sources
from bft_megatron.run import changes

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bft_megatron"

GROUPS = {
    "": schema.Recipe,
    "objective": schema.ObjectiveSettings,
    "data": schema.DataSettings,
    "sources": sources.SourceSettings,
    "parallel": schema.ParallelSettings,
    "train": schema.TrainSettings,
    "lora": schema.LoraSettings,
    "moe": schema.MoeSettings,
}
"""Marker in recipe.md -> the dataclass behind the table there; "" marks the fields of the recipe itself."""


def field_table(settings: type) -> str:
    """Return a Markdown table of a dataclass's fields: name, values, default, meaning."""
    meanings, kinds = field_docstrings(settings), get_type_hints(settings)
    lines = ["| field | values | default | meaning |", "| --- | --- | --- | --- |"]
    for f in fields(settings):
        cells = (f"`{f.name}`", _values(kinds[f.name]) + _range(settings, f.name), _default(f), meanings[f.name])
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def field_docstrings(settings: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass, read from its source."""
    body = ast.parse(inspect.getsource(settings)).body[0].body  # type: ignore[attr-defined]
    return {
        statement.target.id: inspect.cleandoc(after.value.value).replace("\n", " ")
        for statement, after in pairwise(body)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }


def default_of(f: Field[Any]) -> Any:
    """Return a field's default as it is without environment variables; MISSING where it must be given."""
    if f.default_factory is MISSING:
        return f.default
    with patch.dict(os.environ):
        for variable in ("BFT_GROUP_SIZE", "BFT_CONF_GAMMA"):
            os.environ.pop(variable, None)
        return f.default_factory()


def _default(f: Field[Any]) -> str:
    value = default_of(f)
    if value is MISSING:
        return "required"
    if value is None:
        return "left out"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if isinstance(value, str | int | float | dict) else "its fields'"


def _values(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if options := [k for k in get_args(kind) if k is not type(None)]:
        return "names and values" if get_origin(kind) is dict else _values(options[0])
    names = {bool: "`true`, `false`", int: "integer", float: "number", str: "text", Any: "text or list"}
    return names.get(kind, "fields")


def _range(settings: type, name: str) -> str:
    limit = limits.limit_of(settings, name)
    return f", {limit}".replace(f" and at most {limits.INT32:,}", "") if isinstance(limit, limits.Range) else ""


def package_tree(files: bool) -> str:
    """Return the package's rooms as a tree, each with the first sentence of its docstring; its files too if asked."""
    rooms = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
    lines = [("bft_megatron/", summary(PACKAGE / "__init__.py"))]
    lines += [(f"  {path.name}", summary(path)) for path in _files(PACKAGE) if files]
    for room in rooms:
        lines.append((f"  {room.name}/", summary(room / "__init__.py")))
        lines += [(f"    {path.name}", summary(path)) for path in _files(room) if files]
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(["```text", *(f"{name:<{width}}{text}" for name, text in lines), "```"])


def summary(file: Path) -> str:
    """Return the first sentence of a module's docstring, on one line and without its full stop."""
    paragraph = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n\n")[0].replace("\n", " ")
    return re.split(r"\.(?: |$)|(?<=\?) ", paragraph, maxsplit=1)[0]


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]


def flag_tables() -> dict[str, str]:
    """Return the tables of docs/flags.md by the names of their markers."""
    owned: dict[str, list[str]] = {}
    refused = {reason: names.split() for reason, names in flag_groups.REFUSED.items()}
    for made in flags.MADE:
        if made.field:
            owned.setdefault(made.field, []).append(made.flag)
        elif made.why:
            refused.setdefault(made.why, []).append(made.flag)
    for flag, reasons in flag_groups.REFUSED_VALUES.items():
        for value, reason in reasons.items():
            refused.setdefault(reason, []).append(f"{flag}: {value}")
    free, kept = (
        {subject: names.split() for subject, names in groups.items()}
        for groups in (flag_groups.MAY_CHANGE, flag_groups.MAY_NOT_CHANGE)
    )
    return {
        "flags owned": _name_table("field", {f"`{field}`": names for field, names in owned.items()}),
        "flags refused": _name_table("reason", refused),
        "flags free": _name_table("subject", free),
        "flags kept": _name_table("subject", kept),
        "fields free": ", ".join(f"`{field}`" for field in sorted(changes.MAY_CHANGE)),
    }


def _name_table(first: str, groups: dict[str, list[str]]) -> str:
    rows = [f"| {group} | {', '.join(f'`{name}`' for name in names)} |" for group, names in groups.items()]
    return "\n".join([f"| {first} | flags |", "| --- | --- |", *rows])


def filled(text: str, parts: dict[str, str]) -> str:
    """Return a page with each part between its markers, `<!-- begin NAME -->` and `<!-- end NAME -->`.

    Raises:
        ValueError: the page does not have the markers of a part exactly once.
    """
    for name, part in parts.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"expected {begin} and {end} once each")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{part}\n\n{end}{rest.partition(end)[2]}"
    return text


def pages() -> dict[Path, str]:
    """Return every page with a generated part, as it should be."""
    tables = {f"fields {group or 'recipe'}": field_table(settings) for group, settings in GROUPS.items()}
    parts = {
        "README.md": {"rooms": package_tree(files=False)},
        "docs/recipe.md": tables,
        "docs/flags.md": flag_tables(),
        "docs/architecture.md": {"tree": package_tree(files=True)},
    }
    return {ROOT / name: filled((ROOT / name).read_text(), of_page) for name, of_page in parts.items()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
