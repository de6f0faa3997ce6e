"""The command line as a user meets it: what is wrong is named by file, line and field, at once, with status 2."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bft_megatron
from tests.helpers.commands import ROOT, command, run_command

RECIPE = """\
model: {model}
init: random
data:
  train: {data}
  seq_length: 128
train:
  global_batch_size: 4
  iterations: 2
  precision: fp32
output: {out}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The tiny model on four good lines."""
    lines = (ROOT / "recipes/tiny/train.jsonl").read_text().splitlines()[:4]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=ROOT / "recipes/tiny", data=tmp_path / "data.jsonl", out=tmp_path / "out"))
    return path


def refused(recipe: Path, *overrides: str) -> str:
    """Message of a `train` that is refused: within five seconds of work, status 2, nothing run, no process left."""
    before = os.times()
    done = command("train", recipe, *overrides)
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert done.returncode == 2, done.stdout + done.stderr
    assert seconds < 5
    assert "Traceback" not in done.stderr
    assert not subprocess.run(["pgrep", "-f", f"bft_megatron.*{recipe}"], capture_output=True, check=False).stdout
    return " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("seq_length: 128", "seq_lenght: 128", 5, "data.seq_lenght: unknown field; did you mean `data.seq_length`?"),
        ("iterations: 2", "iterations: two", 8, "train.iterations: Value 'two' of type 'str'"),
        ("init: random", "objective: {label_smoothing: 0.1}", 2, "with label smoothing exp(-loss) is no longer"),
        ("init: random", "objective: {name: bfd}", 2, "'bfd' is none of sft, dft, bft"),
        ("init: random", "objective: {name: 'no.module:record'}", 2, "there is no module 'no.module' here"),
        ("init: random", "parallel: {tensor: 3}", 2, "3 does not divide the model's 4 attention heads"),
        ("init: random", "parallel: {pipeline: 3}", 2, "does not divide the model's 4 layers"),
        ("init: random", "parallel: {data: 3}", 7, "4 is not a multiple of micro_batch_size x data-parallel size = 3"),
        ("seq_length: 128", "seq_length: 130\nparallel: {context: 2}", 5, "130 is not a multiple of 4"),
        ("global_batch_size: 4", "global_batch_size: 4\n  micro_batch_size: 2", 8, "a packed micro-batch is one row"),
        ("init: random", "megatron: {sft: true}", 2, "megatron.sft: cannot be used here"),
        ("init: random", "megatron: {lr: 1}", 2, "is set by the recipe's own field train.lr"),
        (
            "init: random",
            "megatron:\n  --adam_beta1: 0.5",
            3,
            "megatron.--adam_beta1: is set by the recipe's own field",
        ),
        (
            "init: random",
            "megatron: {fp8_margin: 1, fp8-margin: 0}",
            2,
            "Megatron's flag fp8-margin, which is given already",
        ),
        ("init: random", "megatron: {distributed-timeout-minutes: abc}", 2, "must be minutes above 0, not 'abc'"),
        ("iterations: 2", "epochs: 1\n  iterations: 2", 9, "give either train.iterations or train.epochs"),
    ],
)
def test_bad_recipe(recipe: Path, old: str, new: str, line: int, message: str):
    recipe.write_text(recipe.read_text().replace(old, new))
    said = refused(recipe)
    assert message in said
    assert f"{recipe}:{line}: " in said


def test_bad_environment_variable(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BFT_GROUP_SIZE", "many")
    assert refused(recipe) == "error: environment variable BFT_GROUP_SIZE: must be a whole number, not 'many'"


@pytest.mark.parametrize(("variable", "value"), [("RANK", ""), ("RANK", "x"), ("WORLD_SIZE", "-1")])
def test_a_rank_that_its_launcher_does_not_number(
    recipe: Path, variable: str, value: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    for name, number in {"RANK": "0", "WORLD_SIZE": "1", variable: value}.items():
        monkeypatch.setenv(name, number)
    assert run_command(monkeypatch, "train", recipe) == 2
    assert f"error: environment variable {variable}: must be a whole number, not {value!r}" in capfd.readouterr().err


def test_what_looks_like_an_emoji_is_printed_as_it_is(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    assert run_command(monkeypatch, "train", recipe, "objective.name=.a:b:c") == 2
    assert "error: objective.name=.a:b:c: " in capfd.readouterr().err


def test_bad_override_is_named_as_it_was_typed(recipe: Path):
    assert "train.lr=fast: Value 'fast'" in refused(recipe, "train.lr=fast")


@pytest.mark.parametrize("model", ["no/such/folder", "organisation/model"])
def test_missing_model(recipe: Path, model: str):
    said = refused(recipe, f"model={model}")
    assert f"error: model={model}: {model}: no such folder" in said
    assert ("hf download organisation/model" in said) == (model == "organisation/model")


@pytest.mark.parametrize(
    ("line", "where"),
    [
        ('{"messages": [', "data.jsonl:5: not JSON"),
        ('{"text": "x"}', "data.jsonl:5: messages"),
        (
            '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}',
            "data.jsonl:5: messages[1].content",
        ),
    ],
)
def test_bad_data_line(recipe: Path, line: str, where: str):
    with (recipe.parent / "data.jsonl").open("a") as file:
        file.write(line + "\n")
    assert where in refused(recipe)


def test_a_flag_that_megatron_does_not_have(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """Megatron itself is asked, by the ranks."""
    assert run_command(monkeypatch, "train", recipe, "megatron.recompute-granulraity=full") == 2
    assert "did you mean recompute-granularity?" in " ".join(capfd.readouterr().err.split())


def test_flags_that_megatron_does_not_take_together(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    assert run_command(monkeypatch, "train", recipe, "megatron.recompute-granularity=full") == 2
    assert "Megatron refuses the run's flags: Using recompute_granularity: full so recompute_method" in " ".join(
        capfd.readouterr().err.split()
    )


def test_a_rank_without_prepared_rows_refuses_and_names_the_command(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    """Under somebody else's launcher nothing is prepared inside the job."""
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    words = [sys.executable, "-m", "bft_megatron", "train", str(recipe)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "bft-megatron prepare RECIPE" in " ".join(done.stderr.split())


def test_the_version_is_the_packages_and_takes_no_torch():
    words = [sys.executable, "-X", "importtime", "-m", "bft_megatron", "--version"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == f"bft-megatron {bft_megatron.__version__}\n"
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "typer" in imported
    assert not imported & {"torch", "megatron", "transformers"}


def test_help_says_which_numbers_to_watch():
    said = " ".join(command("train", "--help").stdout.split())
    assert "Watch mean p and accuracy for bft and dft" in said


def test_a_core_installation_says_which_extras_the_command_needs():
    code = "import sys; sys.modules['typer'] = None; from bft_megatron.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == "error: typer is missing: the command needs this package's extras hf and megatron\n"
