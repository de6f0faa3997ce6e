"""Every page is true: its commands, options, recipes, links and the files that it names exist."""

from __future__ import annotations

import ast
import importlib
import json
import re

import pytest
import yaml
from typer.exceptions import TyperException

from bft_megatron.errors import UserError
from bft_megatron.objective.records import Objective
from bft_megatron.reading.formats import conversation
from bft_megatron.recipe.sources import SourceSettings
from tests.docs import checking
from tests.docs.pages import NAMES, Page, exists, read
from tests.helpers.commands import ROOT

every_page = pytest.mark.parametrize("name", NAMES)


ELSEWHERE = {"swift"}
"""Packages that a page shows and that are not installed here."""


@every_page
def test_commands_exist_with_their_options(name: str):
    for words in read(name).commands():
        checking.check(words)


def test_what_the_readme_and_pages_must_show():
    shown = {tuple(words[:2]) for name in NAMES for words in read(name).commands()}
    assert {("make", "demo"), ("make", "test")} <= {tuple(words[:2]) for words in read("README.md").commands()}
    assert {("bft-megatron", name) for name, command in checking.COMMANDS.items() if not command.hidden} <= shown


@pytest.mark.parametrize(
    "words",
    [
        ["bft-megatron", "trian", "my.yaml"],
        ["bft-megatron", "plan", "my.yaml", "--node", "2"],
        ["bft-megatron", "train", "my.yaml", "train.learning_rate=1"],
        ["bft-megatron", "train", "recipes/none.yaml"],
        ["make", "everything"],
        ["python", "-m", "benchmarks.head", "--draw"],
        ["torchrun", "--processes", "2", "-m", "bft_megatron", "train", "my.yaml"],
        ["sbatch", "launch/none.sh"],
        ["unknown"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_is_found(words: list[str]):
    with pytest.raises((AssertionError, UserError, TyperException, SystemExit)):
        checking.check(words)


@every_page
def test_yaml_blocks_are_recipes_or_parts_of_them(name: str):
    for block in read(name).blocks("yaml"):
        tree = yaml.safe_load(block)
        checking.load(tree if "model" in tree else _with(checking.BASE, tree))


def test_the_readmes_recipe_is_a_run_of_bft():
    (block,) = read("README.md").blocks("yaml")
    assert checking.load(yaml.safe_load(block)).objective.name == "bft"


@every_page
def test_json_blocks_are_conversations(name: str):
    for block in read(name).blocks("json"):
        assert conversation(json.loads(block), SourceSettings("x.jsonl"), 1, 0, name).messages


def test_every_promise_names_its_tests():
    rows = [line for line in read("docs/reliability.md").text.splitlines() if line.startswith("| ") and "::" in line]
    assert len(rows) > 50
    for row in rows:
        named = re.findall(r"`([^`]+\.py)::(\w+)`", row.split(" | ")[2])
        assert named, row
        for file, name in named:
            assert f"\ndef {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


@every_page
def test_python_blocks_import_what_there_is(name: str):
    for block in read(name).blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] not in ELSEWHERE:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), block


def test_the_objective_of_the_page_is_one():
    block = next(b for b in read("docs/objectives.md").blocks("python") if "def record" in b)
    names: dict[str, object] = {}
    exec(block, names)
    assert isinstance(names["record"](2.0), Objective)


@every_page
def test_links_and_anchors_resolve(name: str):
    page = read(name)
    for target in page.links():
        path, _, anchor = target.partition("#")
        file = page.path.parent / path if path else page.path
        assert file.exists(), target
        assert not anchor or anchor in Page(file, file.read_text()).anchors(), target


@every_page
def test_files_that_it_names_exist(name: str):
    assert [path for path in read(name).files() if not exists(path)] == []


def test_quoted_messages_are_the_codes():
    code = " ".join(path.read_text() for path in sorted((ROOT / "bft_megatron").rglob("*.py")))
    quoted = re.findall(r'\*"([^"]+)"\*', read("docs/troubleshooting.md").text)
    assert quoted
    for message in quoted:
        for part in re.split(r"\[\d+\]|\d+|\.\.\.", message):  # the values that a message fills in
            assert part.strip() in code, message


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) < 1000


def test_the_readmes_map_is_the_trees():
    rooms, around = read("README.md").blocks("text")
    found = {f"{path.parent.name}/" for path in ROOT.glob("bft_megatron/*/__init__.py")}
    assert set(re.findall(r"^  (\S+)", rooms, re.MULTILINE)) == found
    folders = re.findall(r"^(\S+)/", around, re.MULTILINE)
    assert len(folders) > 4
    assert all((ROOT / name).is_dir() for name in folders)


def test_the_index_names_every_page():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    index = read("docs/index.md")
    assert set(index.links()) == pages
    contents = re.search(r"^```\{toctree\}\n:hidden:\n\n(.*?)^```$", index.text, re.MULTILINE | re.DOTALL).group(1)
    assert {f"{name}.md" for name in contents.split()} == pages


def _with(base: dict, part: dict) -> dict:
    return base | {k: _with(base.get(k, {}), v) if isinstance(v, dict) else v for k, v in part.items()}
