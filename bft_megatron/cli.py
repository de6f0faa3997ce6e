"""The command line. Each command reads its input, refuses what is wrong with it, and calls the module that does the
work.

Whatever takes seconds to import (torch, Megatron, transformers) is imported inside the command that needs it, after the
checks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from bft_megatron import arguments, checks, launcher
from bft_megatron import recipe as recipes
from bft_megatron.errors import FieldError, UserError
from bft_megatron.hf.architectures import ModelConfig, read_config
from bft_megatron.hf.hub import find_model
from bft_megatron.output import RunFolder
from bft_megatron.recipe import Recipe
from bft_megatron.terminal import output_to

if TYPE_CHECKING:
    from bft_megatron.rows import RunRows

USER_ERROR = 2
"""Exit status where the input is at fault."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Balanced Fine-Tuning (BFT) of large language models on Megatron-Core.",
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The run's recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="Fields to set, for example train.lr=1e-5")
]


@app.command()
def train(recipe_file: RecipeFile, overrides: Overrides = None) -> None:
    """Fine-tune as the recipe says; the same command again goes on where the run stopped.

    Watch mean p and accuracy for bft and dft, lm loss for sft: the loss of bft and dft, p (-log p), is not the function
    that they descend, and their plain cross entropy may rise while mean p rises.
    """
    recipe, config, model_folder = read(recipe_file, overrides or [])
    in_rank = launcher.started_by_launcher()
    processes = int(os.environ["WORLD_SIZE"]) if in_rank else launcher.local_processes(recipe)
    _check(recipe_file, overrides, lambda: checks.check_world(recipe, processes))
    if in_rank:
        rows = _open_rows(recipe)
    else:
        rows = _prepare(recipe_file, overrides, recipe, config, model_folder)
    folder = RunFolder.of(recipe)
    if folder.saved_iteration() >= rows.steps(recipe):
        if os.environ.get("RANK", "0") == "0":
            print(f"finished: {folder.root} holds the checkpoint of the last step, {rows.steps(recipe)}")
    elif in_rank:
        _train_rank(recipe, config, model_folder, rows)
    else:
        sys.exit(launcher.launch(sys.argv[1:], processes))


@app.command()
def prepare(recipe_file: RecipeFile, overrides: Overrides = None) -> None:
    """Tokenise and pack the recipe's data, so that a job starts at once. `train` does it by itself on one machine."""
    recipe, config, model_folder = read(recipe_file, overrides or [])
    _prepare(recipe_file, overrides, recipe, config, model_folder)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's output folder.")],
    folder: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Folder to write, for transformers or vLLM.")],
) -> None:
    """Write the newest checkpoint of a run as a Hugging Face model."""
    from bft_megatron.hf.export import export

    source = RunFolder(run)
    if not source.saved_iteration():
        raise UserError("holds no checkpoint of a run", str(source.checkpoints))
    export(source.checkpoints, folder, source.model)
    print(f"wrote {folder}")


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A Hugging Face model folder.")],
    prompt: Annotated[str, typer.Argument(help="What the user says.")],
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
) -> None:
    """Answer a prompt with a model, greedily, through transformers."""
    from bft_megatron.hf.generate import generate

    print(generate(folder, prompt, max_new_tokens))


def read(path: Path, overrides: list[str]) -> tuple[Recipe, ModelConfig, Path]:
    """Read and check a recipe -> recipe, its model's configuration, the model's folder.

    Raises:
        UserError: the first thing that is wrong, with its file, line and field.
    """
    recipe = recipes.load(path, overrides)
    model_folder = find_model(recipe.model)
    config = read_config(model_folder)

    def check() -> None:
        checks.check_recipe(recipe, config)
        arguments.passed_through(recipe)
        RunFolder.of(recipe).check_continues(recipe)

    _check(path, overrides, check)
    return recipe, config, model_folder


def _check[T](path: Path, overrides: list[str] | None, check: Callable[[], T]) -> T:
    """Call a function; an error about a field gets the file and line, or the override, that set the field."""
    try:
        return check()
    except FieldError as e:
        raise UserError(e.message, recipes.where(path, overrides or [], e.field)) from None


def _open_rows(recipe: Recipe) -> RunRows:
    from bft_megatron.rows import open_rows

    return open_rows(recipe)


def _train_rank(recipe: Recipe, config: ModelConfig, model_folder: Path, rows: RunRows) -> None:
    folder, rank = RunFolder.of(recipe), int(os.environ["RANK"])
    if rank == 0:
        folder.write_config(recipe, model_folder)
    with output_to(folder.log(rank)) as console:
        from bft_megatron import train as training

        training.run(recipe, config, model_folder, rows, console)


def _prepare(
    path: Path, overrides: list[str] | None, recipe: Recipe, config: ModelConfig, model_folder: Path
) -> RunRows:
    from bft_megatron.rows import prepare_rows

    rows = _check(path, overrides, lambda: prepare_rows(recipe, model_folder, config.vocab_size))
    print(f"{recipe.data.train}: {rows.train.summary()}")
    if rows.valid:
        print(f"{recipe.data.valid}: {rows.valid.summary()}")
    return rows


def main() -> None:
    """Entry point: user errors end with status 2 and one line, in every rank alike; said once, by rank 0."""
    sys.path.insert(0, "")  # a recipe's own objective, `package.module:record`, is found from where the command runs
    try:
        app()
    except UserError as e:
        if os.environ.get("RANK", "0") == "0":
            Console(stderr=True).print(f"[red]error:[/] {escape(str(e))}", soft_wrap=True, highlight=False)
        sys.exit(USER_ERROR)
