"""A YAML file of fields, with the line of each field."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._yaml import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

from bft_megatron.errors import UserError, reading, shortened

_TAG = "tag:yaml.org,2002:"
_TAGS = {f"{_TAG}{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge", "timestamp")}
_MERGE = f"{_TAG}merge"

MOST_DIGITS = 100
MOST_LEVELS = 50
MOST_VALUES = 100_000
"""Values of a file, each alias counted as often as it is used; a recipe has some dozens."""


class YamlFile:
    """A YAML file of fields: their values in `tree`, their line numbers in `lines`.

    Raises:
        UserError: the file is not YAML, with the line, or not a mapping of fields with plain values.
    """

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.lines: dict[str, int] = {}
        with reading(str(path)):
            try:
                node = composed(text, lambda node, name: _place(path, node, name))
                if not isinstance(node, yaml.MappingNode):
                    raise UserError("must be a mapping of fields, such as those in recipes/", str(path))
                self._note_lines(node, "")
                tree = OmegaConf.create(text)
            except yaml.YAMLError as e:
                self._refuse(e, text)
            except OmegaConfBaseException as e:
                raise UserError(said(e), self.where(e.full_key or "")) from None
            assert isinstance(tree, DictConfig), "the text is a mapping"
            self.tree = tree

    def _refuse(self, error: yaml.YAMLError, text: str) -> NoReturn:
        mark, what = getattr(error, "problem_mark", None), getattr(error, "problem", None) or shortened(error, 200)
        line = mark.line + 1 if mark else None
        if isinstance(error, yaml.reader.ReaderError):
            line, what = text.count("\n", 0, error.position) + 1, f"the character #x{error.character:04x} in it"
        raise UserError(f"not YAML: {what}", str(self.path) if line is None else f"{self.path}:{line}") from None

    def _note_lines(self, node: yaml.MappingNode, prefix: str) -> None:
        for key, value in node.value:
            if key.tag == _MERGE:
                for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    self._note_lines(merged, prefix)
                continue
            name = f"{prefix}{key.value}"
            self.lines[name] = key.start_mark.line + 1
            if isinstance(value, yaml.MappingNode):
                self._note_lines(value, f"{name}.")

    def where(self, key: str) -> str:
        """Return `file:line: key`, without the parts that are not known."""
        line = self.lines.get(key)
        place = f"{self.path}:{line}" if line else str(self.path)
        return f"{place}: {shortened(key, 100)}" if key else place


def said(error: OmegaConfBaseException) -> str:
    """Return what is wrong with a value, in the terms of a file's author."""
    first = (error.msg or str(error)).partition("\n")[0]
    if unset := re.search(r"Environment variable '(.*)' not found", first):
        return f"the environment variable {shortened(unset[1])} is not set"
    if "ecursive interpolation" in first or "parent node" in first:
        return "refers to itself"
    return shortened(first, 300)


def _place(path: Path, node: yaml.Node | yaml.Event, name: str) -> str:
    assert node.start_mark is not None, "it comes from text"
    return f"{path}:{node.start_mark.line + 1}{f': {shortened(name, 100)}' if name else ''}"


def composed(text: str, place: Callable[[yaml.Node | yaml.Event, str], str]) -> yaml.Node | None:
    """Return the nodes of a YAML text; None if it is empty.

    Args:
        place: (node, its dotted name) -> its place, for errors.

    Raises:
        UserError: a name that is not text, a kind of value that no field has, too deep a nest, too many values.
        yaml.YAMLError: the text is not YAML.
    """
    depth = 0
    for event in yaml.parse(text):  # composing is recursive
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_LEVELS:
            raise UserError(f"nested deeper than {MOST_LEVELS} levels", place(event, ""))
    node = yaml.compose(text, get_yaml_loader())  # OmegaConf's own: PyYAML's reads 0E0 as text, OmegaConf a number
    if node is not None and (count := _Checked(place).count(node, "")) > MOST_VALUES:
        raise UserError(f"{count:,} values with the aliases: at most {MOST_VALUES:,} are read", place(node, ""))
    return node


class _Checked:
    """The nodes that have been checked, with the number of values in each; 0 while it is being counted."""

    def __init__(self, place: Callable[[yaml.Node | yaml.Event, str], str]) -> None:
        self.place = place
        self.counts: dict[yaml.Node, int] = {}

    def count(self, node: yaml.Node, name: str) -> int:
        """Return the number of values in a node. Raises UserError as `composed`."""
        if node not in self.counts:
            self.counts[node] = 0
            self._check(node, name)
            self.counts[node] = 1 + sum(self.count(value, inner) for inner, value in self._inner(node, name))
        elif not self.counts[node]:
            raise UserError("an alias of what it is in", self.place(node, name))
        return self.counts[node]

    def _check(self, node: yaml.Node, name: str) -> None:
        if node.tag not in _TAGS:
            kind = shortened(node.tag.replace(_TAG, "!!"))
            raise UserError(f"no field takes a value of the kind {kind}", self.place(node, name))
        if node.tag == f"{_TAG}int" and len(node.value) > MOST_DIGITS:
            what = f"a number of {len(node.value):,} digits: no field takes more than {MOST_DIGITS}"
            raise UserError(what, self.place(node, name))

    def _inner(self, node: yaml.Node, name: str) -> list[tuple[str, yaml.Node]]:
        if isinstance(node, yaml.SequenceNode):
            return [(f"{name}[{i}]", value) for i, value in enumerate(node.value)]
        return (
            [self._named(key, value, name) for key, value in node.value] if isinstance(node, yaml.MappingNode) else []
        )

    def _named(self, key: yaml.Node, value: yaml.Node, name: str) -> tuple[str, yaml.Node]:
        if key.tag == _MERGE:
            return name, value
        if key.tag != f"{_TAG}str":
            shown = shortened(key.value) if isinstance(key, yaml.ScalarNode) and key.value else "null"
            raise UserError(f"a field's name must be text: put {shown} in quotes", self.place(key, name))
        return f"{name}.{key.value}" if name else key.value, value
