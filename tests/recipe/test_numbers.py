"""Numbers are held to their fields' ranges where they enter: file, overrides, environment, `megatron:`, sources."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from bft_megatron.commands.request import read
from bft_megatron.recipe.limits import Range, limit_of
from bft_megatron.recipe.schema import Recipe
from bft_megatron.recipe.sources import SourceSettings
from tests.helpers.commands import ROOT, run_command

Refused = Callable[..., str]

WRONG = [
    ("train", "clip_grad", ".nan", "must be finite and at least 0, not nan"),
    ("train", "clip_grad", "-1", "must be at least 0, not -1.0"),
    ("objective", "gamma", ".inf", "must be finite and above 0, not inf"),
    ("objective", "gamma", "0", "must be above 0, not 0.0"),
    ("objective", "group_size", "9999999999", "at most 2,147,483,647, not 9999999999"),
    ("train", "lr", ".inf", "must be finite and above 0, not inf"),
    ("train", "lr", "0", "must be above 0, not 0.0"),
    ("train", "lr", "nan", "must be finite and above 0, not nan"),
    ("train", "min_lr", ".nan", "must be finite"),
    ("train", "weight_decay", ".inf", "must be finite"),
    ("train", "adam_beta1", "1", "must be at least 0 and below 1, not 1.0"),
    ("train", "adam_beta2", "2", "must be at least 0 and below 1, not 2.0"),
    ("train", "adam_beta2", "-0.1", "must be at least 0 and below 1, not -0.1"),
    ("train", "adam_eps", "0", "must be at least 1e-37, not 0.0"),
    ("train", "adam_eps", "1e-300", "must be at least 1e-37, not 1e-300"),
    ("train", "exit_after", ".inf", "must be finite and above 0"),
    ("train", "max_skipped", "0", "must be at least 1 and"),
    ("train", "keep_last", "0", "must be at least 1 and"),
    ("train", "seed", "-1", "must be at least 0 and"),
    ("train", "seed", "4294967296", "at most 2,147,483,647, not 4294967296"),
    ("train", "seed", "9" * 5000, "a number of 5,000 digits"),
    ("data", "pad_multiple", "0", "must be at least 1 and"),
    ("parallel", "tensor", "0", "must be at least 1 and"),
    ("lora", "alpha", ".nan", "must be finite and above 0, not nan"),
    ("lora", "rank", "-8", "must be at least 1 and"),
    ("lora", "dropout", ".nan", "must be finite"),
    ("megatron", "lr-warmup-init", ".inf", "must be finite, not inf"),
    ("megatron", "lr-warmup-init", "nan", "must be finite, not nan"),
    ("megatron", "wandb-save-dir", "[1, .nan]", "must be finite"),
    ("megatron", "distributed-timeout-minutes", "1e30", "must be above 0 and at most 527,040"),
]


@pytest.mark.parametrize(("group", "name", "value", "message"), WRONG, ids=[f"{g}.{n}={v[:9]}" for g, n, v, _ in WRONG])
def test_a_number_out_of_range_is_named(
    recipe: Path, refused: Refused, group: str, name: str, value: str, message: str
):
    text = recipe.read_text()
    line = f"  {name}: {value}\n"
    recipe.write_text(
        text.replace(f"{group}:\n", f"{group}:\n{line}") if f"\n{group}:" in text else f"{text}{group}:\n{line}"
    )
    number = recipe.read_text()[: recipe.read_text().index(line)].count("\n") + 1
    said = refused()
    assert said.startswith(f"{recipe}:{number}: {group}.{name}: ")
    assert message in said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.global_batch_size=1000000000000", "at most 2,147,483,647, not 1000000000000"),
        ("train.iterations=1e400", "Value"),
        ("train.clip_grad=nan", "must be finite and at least 0"),
        ("train={lr: .inf}", "must be finite and above 0"),
        ("megatron={fp8-margin: .inf}", "must be finite"),
        ("train.lr=" + "9" * 5000, "a number of 5,000 digits"),
        ("train.lr=" + "9" * 400 + ".0", "must be finite"),
        ("parallel.data=0", "must be at least 1"),
    ],
)
def test_an_override_out_of_range_is_named_as_it_was_typed(refused: Refused, override: str, message: str):
    said = refused(override)
    assert said.startswith(f"{override[:190]}")
    assert message in said


@pytest.mark.parametrize("epochs", [".nan", ".inf", "0", "1e7", "1e300"])
def test_epochs_that_no_run_has(recipe: Path, refused: Refused, epochs: str):
    recipe.write_text(recipe.read_text().replace("iterations: 2", f"epochs: {epochs}"))
    assert refused().startswith(f"{recipe}:8: train.epochs: must be ")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("BFT_GROUP_SIZE", "9" * 5000, "must be a whole number, not '999"),
        ("BFT_GROUP_SIZE", "1" + "0" * 99, "at most 2,147,483,647"),
        ("BFT_GROUP_SIZE", "0", "must be at least 1"),
        ("BFT_CONF_GAMMA", "nan", "must be finite and above 0, not 'nan'"),
        ("BFT_CONF_GAMMA", "1e400", "must be finite and above 0, not '1e400'"),
        ("BFT_CONF_GAMMA", "-1", "must be above 0, not '-1'"),
    ],
)
def test_environment_variables_have_the_fields_ranges(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
):
    monkeypatch.setenv(variable, value)
    said = refused()
    assert said.startswith(f"environment variable {variable}: ")
    assert message in said


@pytest.mark.parametrize("weight", [".nan", ".inf", "0", "-1", "1e30", "9" * 90])
def test_weight_of_a_source(recipe: Path, refused: Refused, weight: str):
    data = str(ROOT / "recipes/tiny/train.jsonl")
    recipe.write_text(recipe.read_text().replace(f"  train: {data}", f"  train: [{{path: {data}, weight: {weight}}}]"))
    assert refused().startswith(f"{recipe}:4: data.train: `weight`: must be ")


@pytest.mark.parametrize(("batch", "warnings"), [(1_000_000, 1), (1_000, 0)])
def test_a_step_of_many_passes_over_the_data_is_said(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], batch: int, warnings: int
):
    assert run_command(monkeypatch, "prepare", recipe, f"train.global_batch_size={batch}", "data.seq_length=512") == 0
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(said) == warnings
    assert all(line.startswith("warning: train.global_batch_size: a step reads 1,000,000 rows, ") for line in said)


def test_a_source_may_be_given_alone_and_is_named(recipe: Path, refused: Refused):
    data = ROOT / "recipes/tiny/train.jsonl"
    assert read(recipe, [f"data.train={{path: {data}, weight: 2}}"]).recipe.data.sources("train")[0].weight == 2
    assert refused(f"data.train={{path: {data}, weight: .nan}}").startswith("data.train={path: ")
    recipe.write_text(recipe.read_text().replace(f"train: {data}", f"train:\n    path: {data}\n    weight: -1"))
    assert refused().startswith(f"{recipe}:4: data.train: `weight`: must be above 0 and")


@pytest.mark.parametrize(
    ("command", "option", "message"),
    [
        ("plan", "--nodes=0", "--nodes"),
        ("plan", "--gpus-per-node=0", "--gpus-per-node"),
        ("plan", "--gpu=nan", "--gpu: the GiB of a GPU's memory must be finite and above 0, not nan"),
        ("plan", "--gpu=-3", "--gpu: the GiB of a GPU's memory must be above 0, not -3"),
        ("preflight", "--world=0", "--world"),
    ],
)
def test_options_of_commands(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    command: str,
    option: str,
    message: str,
):
    assert run_command(monkeypatch, command, recipe, option) == 2
    assert message in (said := capfd.readouterr().err)
    assert "Traceback" not in said


def test_the_largest_and_smallest_numbers_that_make_sense_are_taken(recipe: Path):
    taken = ["train.lr=1e30", "train.clip_grad=0", "train.adam_beta1=0", "train.seed=2147483647", "objective.gamma=1e9"]
    assert read(recipe, taken).recipe.train.lr == 1e30


def test_every_number_of_the_schema_has_a_range():
    groups = [
        next((k for k in (kind, *get_args(kind)) if is_dataclass(k)), None) for kind in get_type_hints(Recipe).values()
    ]
    for group in [*filter(None, groups), SourceSettings]:
        kinds = get_type_hints(group)
        numbers = [f.name for f in fields(group) if {int, float} & {kinds[f.name], *get_args(kinds[f.name])}]
        assert [name for name in numbers if not isinstance(limit_of(group, name), Range)] == []


def test_a_number_is_refused_before_torch_is_imported(recipe: Path):
    words = [sys.executable, "-X", "importtime", "-m", "bft_megatron", "train", str(recipe), "train.clip_grad=nan"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "omegaconf" in imported
    assert not imported & {"torch", "megatron", "transformers"}
