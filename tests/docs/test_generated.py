"""The generated parts of the pages are the code's: fields, defaults and the tree."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields

import pytest
import yaml

from docs import generate
from tests.docs.pages import read


def test_generated_parts_are_up_to_date():
    for path, text in generate.pages().items():
        assert path.read_text() == text, "run: python -m docs.generate"


@pytest.mark.parametrize("group", generate.GROUPS)
def test_the_page_has_every_field_with_its_default(group: str):
    text = read("docs/recipe.md").text
    table = re.search(rf"<!-- begin fields {group or 'recipe'} -->(.*?)<!-- end", text, re.DOTALL).group(1)
    rows = {row[0].strip("`"): row for row in map(_cells, table.strip().splitlines()[2:])}
    found = fields(generate.GROUPS[group])
    assert list(rows) == [f.name for f in found]
    for f in found:
        _, values, shown, meaning = rows[f.name]
        assert values, f.name
        assert len(meaning) > 10, f.name
        _check_default(generate.default_of(f), shown)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def _check_default(value: object, shown: str) -> None:
    if value is MISSING:
        assert shown == "required"
    elif value is None:
        assert shown == "left out"
    elif isinstance(value, float):
        assert float(shown.strip("`")) == value
    elif isinstance(value, str | int | dict):
        assert yaml.safe_load(shown.strip("`")) == value
    else:
        assert shown == "its fields'"


def test_the_environment_does_not_change_the_page(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BFT_GROUP_SIZE", "7")
    (size,) = [f for f in fields(generate.GROUPS["objective"]) if f.name == "group_size"]
    assert generate.default_of(size) == 256


def test_the_tree_says_something_of_every_file():
    lines = [line for line in generate.package_tree(files=True).splitlines() if not line.startswith("```")]
    assert len(lines) == len([p for p in generate.PACKAGE.rglob("*.py") if p != generate.PACKAGE / "__init__.py"]) + 1
    assert all(len(line.split()) > 2 for line in lines)


def test_a_page_without_its_markers_is_refused():
    with pytest.raises(ValueError, match="expected <!-- begin tree -->"):
        generate.filled("no markers", {"tree": "x"})
