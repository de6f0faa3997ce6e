"""What messages, pages and recipes advise exists: each of Megatron's flags, and each field of a recipe."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from megatron.training.arguments import add_megatron_arguments

from bft_megatron.recipe import flags, reader
from bft_megatron.recipe.schema import Recipe
from tests.helpers.commands import ROOT

CODE = sorted((ROOT / "bft_megatron").rglob("*.py"))
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").glob("*.yaml"))]
FLAG = r"[a-z][a-z0-9]*(?:-[a-z0-9]+)+"
ADVISED = (rf"megatron\.(?:--)?({FLAG})", rf"megatron: \{{({FLAG})", rf"Megatron's `(?:--)?({FLAG})`")
IN_MESSAGES = (*ADVISED, rf"`(?:--)?({FLAG})(?:[ =:][^`]*)?`", rf"; use ({FLAG})")
"""In messages, a word with a dash in backticks is a flag, or a command."""
COMMANDS = {"bft-megatron", "llamafactory-cli"}


@pytest.fixture(scope="module")
def known() -> set[str]:
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return {option.lstrip("-") for option in parser._option_string_actions}


def messages(file: Path) -> Iterator[str]:
    """Every text of a module but its docstrings; what an f-string fills in is left out."""
    tree = ast.parse(file.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (docstrings | inner):
            yield node.value


def advised(text: str, patterns: tuple[str, ...]) -> set[str]:
    return {name for pattern in patterns for name in re.findall(pattern, text)} - COMMANDS


def test_flags_in_messages_exist(known: set[str]):
    found = {flag for file in CODE for text in messages(file) for flag in advised(text, IN_MESSAGES)}
    assert {"account-for-embedding-in-pipeline-split", "decoder-first-pipeline-num-layers", "lr-decay-style"} <= found
    assert found - known == set()
    assert [flag for flag in found if flags.refusal(flag)] == []


def test_flags_in_pages_and_recipes_exist(known: set[str]):
    found = {flag for file in TEXTS for flag in advised(file.read_text(), ADVISED)}
    assert {"grad-reduce-in-bf16", "recompute-granularity", "distributed-timeout-minutes"} <= found
    assert found - known == set()
    assert [flag for flag in found if flags.refusal(flag)] == []


def test_flags_that_recipes_comment_out_exist(known: set[str]):
    lines = [line for file in (ROOT / "recipes").glob("*.yaml") for line in file.read_text().splitlines()]
    found = {match[1] for line in lines if (match := re.match(rf"  # ({FLAG}): ", line))}
    assert "optimizer-cpu-offload" in found
    assert found - known == set()


def field_names(settings: type = Recipe, prefix: str = "") -> set[str]:
    kinds, names = get_type_hints(settings), set()
    for field in fields(settings):
        names.add(f"{prefix}{field.name}")
        group = next((kind for kind in (kinds[field.name], *get_args(kinds[field.name])) if is_dataclass(kind)), None)
        names |= field_names(group, f"{prefix}{field.name}.") if group else set()
    return names


GROUPS = "|".join(sorted({name.partition(".")[0] for name in field_names() if "." in name}))
NAMED = rf"(?<![\w./-])((?:{GROUPS})\.[a-z_0-9]+)(?![\w(/.]*(?:\(|/|\.(?:py|json|yaml|jsonl|md)))"
FILES = {".jsonl", ".json", ".yaml", ".md", ".py", ".parquet", ".arrow", ".txt"}


@pytest.mark.parametrize("kind", ["messages", "pages and recipes"])
def test_fields_exist(kind: str):
    texts = [t for file in CODE for t in messages(file)] if kind == "messages" else [f.read_text() for f in TEXTS]
    found = {name for text in texts for name in re.findall(NAMED, text)}
    named = {name for name in found if f".{name.partition('.')[2]}" not in FILES}
    assert {"train.iterations", "data.seq_length", "objective.head"} <= named
    assert named - field_names() - reader.REFUSED_FIELDS.keys() == set()
