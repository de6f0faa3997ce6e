"""Whether a command of a page is one: its program, its options, its files and the fields that it sets."""

from __future__ import annotations

import re
import tempfile
import tomllib
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer
import yaml
from torch.distributed.run import get_args_parser

from bft_megatron.cli import app
from bft_megatron.recipe import reader
from bft_megatron.recipe.schema import Recipe
from tests.docs.pages import exists
from tests.helpers.commands import ROOT

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
MAKEFILE = (ROOT / "Makefile").read_text()
OTHERS = {"docker", "enroot", "kubectl", "sky", "export", "pip", ".venv/bin/pip", "python3.12"}
"""Programs of others: only the files that they are given are looked at."""

BASE: dict[str, Any] = {
    "model": "recipes/tiny",
    "data": {"train": "recipes/tiny/train.jsonl"},
    "train": {"iterations": 2},
    "output": "runs/x",
}
"""What makes a recipe of a part of one."""


def check(words: list[str]) -> None:
    """Fail where a command does not exist, or would refuse its options or fields before it reads any file."""
    program, rest = words[0], ["2" if word == "N" else word for word in words[1:]]
    if program == "bft-megatron":
        check_command(rest)
    elif program == "make":
        assert re.search(rf"^{re.escape(rest[0])}:", MAKEFILE, re.MULTILINE), f"make {rest[0]}"
    elif program == "python":
        check_python(rest)
    elif program == "torchrun":
        check_torchrun(rest)
    elif program == "sbatch" or program.startswith("launch/"):
        check_launch([word for word in words if word != "sbatch"])
    else:
        assert program in OTHERS, program
        check_files(rest)
        check_groups(rest)


def check_command(words: list[str]) -> None:
    """A command of ours; one without arguments is a mention, of which only the name is looked at."""
    name, arguments = words[0], words[1:]
    assert name in COMMANDS, name
    if arguments:
        COMMANDS[name].make_context(name, list(arguments))
        check_fields([word for word in arguments if not word.startswith("-") and "=" in word])
    check_files(arguments)


def check_fields(overrides: list[str]) -> None:
    """Fields of a recipe, `key=value`, that its reader takes."""
    load(BASE, overrides)


def check_python(words: list[str]) -> None:
    """A module or a script of ours, and that its source knows each option."""
    if words[0] == "-m":
        found = find_spec(words[1])
        assert found, words[1]
        source, rest = Path(found.origin), words[2:]
    else:
        source, rest = ROOT / words[0], words[1:]
    text = source.read_text()
    for word in rest:
        assert not word.startswith("--") or f'"{word}"' in text, f"{words}: {word}"
    if "overrides" in text:
        check_fields([word for word in rest if "=" in word])


def check_torchrun(words: list[str]) -> None:
    """torchrun's own options, then a command of ours or an example."""
    parsed = get_args_parser().parse_args(words)
    if not parsed.module:
        assert parsed.training_script.startswith("examples/"), words
        return check_files([parsed.training_script])
    assert (parsed.module, parsed.training_script) == (True, "bft_megatron"), words
    check_command(parsed.training_script_args)


def check_launch(words: list[str]) -> None:
    """A script of launch/, options of sbatch around it, and fields."""
    scripts = [word for word in words if word.endswith(".sh")]
    assert scripts, words
    check_files(scripts)
    check_fields([word for word in words if "=" in word and not word.startswith("-")])


def check_files(words: list[str]) -> None:
    """Files of the repository that are named."""
    for word in words:
        if re.match(r"(recipes|launch|examples|benchmarks|tests|docs)/", word):
            assert exists(word), word


def check_groups(words: list[str]) -> None:
    """Dependency groups that pip is asked for."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    for option, name in pairwise(words):
        assert option != "--group" or name in groups, name


def load(tree: dict[str, Any], overrides: list[str] | None = None) -> Recipe:
    """Read a recipe as `bft-megatron` does, its sources too."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "my.yaml"
        file.write_text(yaml.safe_dump(tree))
        recipe = reader.load(file, overrides or [])
    recipe.data.sources("train")
    recipe.data.sources("valid")
    return recipe
