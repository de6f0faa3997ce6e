"""The README's commands and claims are true: its commands exist, its fields and defaults are the recipe's."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

from bft_megatron.recipe import reader
from bft_megatron.recipe.schema import Recipe
from tests.test_cli import ROOT, command

README = (ROOT / "README.md").read_text()


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= targets


def test_commands_exist():
    help_text = command("--help").stdout
    named = set(re.findall(r"^bft-megatron ([a-z-]+)", README, re.MULTILINE))
    assert {"train", "export", "generate"} <= named
    assert all(re.search(rf"\b{name}\b", help_text) for name in named)


def test_files_that_it_links_to_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_example_is_a_recipe(tmp_path: Path):
    example = re.search(r"```yaml\n(model: .*?)```", README, re.DOTALL).group(1)
    (tmp_path / "my.yaml").write_text(example)
    assert reader.load(tmp_path / "my.yaml").objective.name == "bft"


def test_every_field_of_a_recipe_is_described():
    for group, kind in get_type_hints(Recipe).items():
        names = [f"{group}.{f.name}" for f in fields(kind)] if is_dataclass(kind) else [group]
        for name in names:
            described = f"`{name}`" in README or f"`{name.partition('.')[2]}`" in README
            assert described or name in ("data.train", "data.valid", "train.iterations", "train.epochs"), name
