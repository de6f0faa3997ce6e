"""The list of changes is complete, names what is there, and is the page in docs/."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
from collections import Counter
from pathlib import Path

import pytest

import bft_megatron
from bft_megatron.upstream.change import MEGATRON, TORCH, Change
from bft_megatron.upstream.page import changes, page

PACKAGE = Path(bft_megatron.__file__).parent
ROOT = PACKAGE.parent
ALL = [change for declared in changes().values() for change in declared]


@pytest.mark.parametrize("release", [MEGATRON, TORCH])
def test_the_declarations_are_for_what_is_installed(release: str):
    name, version = release.split()
    assert importlib.metadata.version(name) == version


@pytest.mark.parametrize("change", ALL, ids=lambda change: change.target)
def test_the_name_is_there_and_takes_what_is_relied_on(change: Change):
    assert hasattr(change.owner, change.name) or change.name in change.owner.__annotations__
    if change.parameters is None:
        return
    taken = tuple(inspect.signature(getattr(change.owner, change.name)).parameters)
    if change.kind == "replaced":
        assert taken == change.parameters
    else:
        assert set(change.parameters) <= set(taken)


@pytest.mark.parametrize("change", ALL, ids=lambda change: change.target)
def test_every_change_says_why_and_until_when_and_what_holds_it(change: Change):
    assert change.why
    assert change.until
    assert (ROOT / change.test).is_file()


def test_nothing_is_declared_twice():
    assert [target for target, n in Counter(change.target for change in ALL).items() if n > 1] == []


def test_the_page_is_made_from_the_declarations():
    made = "`python -m bft_megatron.upstream.page > docs/megatron.md`"
    assert (ROOT / "docs" / "megatron.md").read_text() == page(), f"make it again: {made}"


def _imported(tree: ast.Module, *packages: str) -> set[str]:
    """Names that a module imports from some packages, at its top or within a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.name, alias.asname or alias.name.partition(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "", alias.asname or alias.name) for alias in node.names]
        else:
            continue
        found |= {name for module, name in names if module.partition(".")[0] in packages}
    return found


def _root(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def undeclared(source: str) -> list[str]:
    """Assignments to attributes of what is imported from Megatron or torch, and private names of Megatron's."""
    tree = ast.parse(source)
    foreign, megatrons, found = _imported(tree, "megatron", "torch"), _imported(tree, "megatron"), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Delete):
            targets = [node.target] if isinstance(node, ast.AnnAssign | ast.AugAssign) else node.targets
            targets = [part for target in targets for part in ast.walk(target)]
            found += [ast.unparse(t) for t in targets if isinstance(t, ast.Attribute) and _root(t) in foreign]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
            found += [ast.unparse(node)] if _root(node.args[0]) in foreign else []
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron"):
            found += [alias.name for alias in node.names if alias.name.startswith("_")]
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            hooks = node.attr in ("_forward_hooks", "_forward_pre_hooks")
            found += [ast.unparse(node)] if hooks or _root(node) in megatrons else []
    return found


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("from megatron.training import training\ntraining.train = 1", "training.train"),
        ("import torch\ntorch.cuda.is_available = 1", "torch.cuda.is_available"),
        ("def f():\n    from megatron.core import x as y\n    setattr(y, 'z', 1)", "setattr(y, 'z', 1)"),
        ("import torch.distributed as dist\ndist.a, dist.b = 1, 2", "dist.a"),
        ("from megatron.training.global_vars import _set_timers", "_set_timers"),
        ("from megatron.training import global_vars\nglobal_vars._set_timers(1)", "global_vars._set_timers"),
        ("layer._forward_hooks", "layer._forward_hooks"),
    ],
)
def test_an_undeclared_change_is_found(source: str, what: str):
    assert what in undeclared(source)


def test_nothing_else_is_changed():
    own = PACKAGE / "upstream"
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if own not in path.parents]
    assert len(files) > 50
    assert {str(path): found for path in files if (found := undeclared(path.read_text()))} == {}
