"""The package stays in small pieces: files of at most 300 lines, functions of a few."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

FILES = sorted((Path(__file__).parents[1] / "bft_megatron").rglob("*.py"))


def functions() -> list[tuple[int, str]]:
    """Lines and place of every function."""
    nodes = ((file, node) for file in FILES for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [(n.end_lineno - n.lineno + 1, f"{file.name}:{n.name}") for file, n in nodes if isinstance(n, kinds)]


def test_no_file_is_over_300_lines():
    assert FILES
    assert [str(file) for file in FILES if len(file.read_text(encoding="utf-8").splitlines()) > 300] == []


def test_functions_are_short():
    found = functions()
    assert statistics.median(lines for lines, _ in found) <= 8
    assert max(found)[0] <= 90, max(found)
