"""The command line: each command reads and checks its input, then calls the module that does the work.

Modules that take seconds to import (torch, Megatron, transformers) are imported inside the commands that need them,
after the checks.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from bft_megatron import __version__
from bft_megatron.commands import files, marked
from bft_megatron.commands.request import read
from bft_megatron.errors import InUse, Unreadable, UserError, status
from bft_megatron.processes import launcher, ranks
from bft_megatron.processes.terminal import output_to
from bft_megatron.recipe import reader, rules
from bft_megatron.run.folder import RunFolder

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Balanced Fine-Tuning (BFT) of large language models on Megatron-Core.",
)

RecipeFile = Annotated[Path, files.Argument(metavar="RECIPE.yaml", help="The run's recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="Fields to set, for example train.lr=1e-5")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"bft-megatron {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Handle the options before a command's name."""


@app.command()
def train(recipe_file: RecipeFile, overrides: Overrides = None) -> None:
    """Fine-tune as the recipe says; the same command again resumes the run.

    Watch mean p and accuracy for bft and dft, lm loss for sft. The reported loss of bft and dft, p (-log p), is not the
    function being minimised, and their plain cross entropy may rise while mean p rises.
    """
    request = read(recipe_file, overrides)
    marked.convert(request) if request.recipe.train.iterations == 0 else marked.train(request)


@app.command()
def prepare(recipe_file: RecipeFile, overrides: Overrides = None) -> None:
    """Tokenise and pack the recipe's data before a job on many machines. On one machine `train` does it itself."""
    read(recipe_file, overrides).prepare()


@app.command()
def inspect(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    row: Annotated[int, typer.Option(help="Number of the row, from 0.")] = 0,
    html: Annotated[Path | None, files.Option(metavar="FILE", help="Write an HTML page instead.")] = None,
) -> None:
    """Show a row of the training data: the text of its samples, and which tokens are learned."""
    request = read(recipe_file, overrides)
    from bft_megatron.conversations import tokenizers
    from bft_megatron.data import inspection, page
    from bft_megatron.reading import sources
    from bft_megatron.run.prepared import prepare_rows

    data = request.recipe.data
    rows = request.check(lambda: prepare_rows(request.recipe, request.model_folder, request.config.vocab_size))
    origins = [sources.open_source(source).files for source in data.sources("train")]
    shown = inspection.read(rows.train, origins, tokenizers.load(request.model_folder, data.chat_template), row)
    if html is None:
        inspection.print_row(shown, Console(emoji=False))
        return
    files.write(html, page.page(shown), "the page")


@app.command()
def check(recipe_file: RecipeFile, overrides: Overrides = None) -> None:
    """Compare the recipe's layout with transformers on real rows before a long run. Exit status 1: they differ."""
    request = read(recipe_file, overrides)
    in_rank, processes = request.world()
    request.check(lambda: rules.check_comparable(request.recipe))
    if not in_rank:
        request.prepare()
        sys.exit(launcher.launch(sys.argv[1:], processes))
    rows = request.rows_of_rank()
    with output_to(request.folder.log(ranks.rank())) as console:
        from bft_megatron.commands import compare as checking

        good = checking.run(request.recipe, request.config, request.model_folder, rows, console)
    sys.exit(0 if good else 1)


_SCORES = "Default, in the run's folder: scores.jsonl, or scores_valid, scores_trained or scores_valid_trained.jsonl."


@app.command()
def score(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    data: Annotated[Literal["train", "valid"], typer.Option(help="The samples to score.")] = "train",
    trained: Annotated[
        bool, typer.Option("--trained", help="Use the run's newest checkpoint, not the model it began with.")
    ] = False,
    out: Annotated[Path | None, files.Option(metavar="FILE", help=_SCORES)] = None,
) -> None:
    """Write the model's confidence in every sample and the objective's weight of it, one line of JSON a sample."""
    request = read(recipe_file, overrides)
    in_rank, processes = request.world()
    model = request.trained() if trained else request
    if data == "valid" and request.recipe.data.valid is None:
        raise UserError("the recipe has none: set data.valid", "--data valid")
    named = ["scores", *["valid"] * (data == "valid"), *["trained"] * trained]
    file = out or request.folder.root / f"{'_'.join(named)}.jsonl"
    if not in_rank:
        request.prepare()
        files.make_folder(file)
        sys.exit(launcher.launch(sys.argv[1:], processes))
    rows = request.rows_of_rank()
    with output_to(request.folder.log(ranks.rank())) as console:
        from bft_megatron.commands import score as scoring

        blend = rows.train if data == "train" else rows.valid
        assert blend is not None, "a recipe with data.valid has validation rows"
        scoring.run(model.recipe, request.config, model.model_folder, blend, data, file, console)


@app.command()
def convert(recipe_file: RecipeFile, overrides: Overrides = None) -> None:
    """Write the recipe's model as a Megatron checkpoint; `train` with train.iterations=0 does the same."""
    marked.convert(read(recipe_file, overrides))


@app.command(hidden=True)
def preflight(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    world: Annotated[int, typer.Option(min=1, help="Ranks of the job.")] = 1,
    per_node: Annotated[int, typer.Option(min=1, help="Ranks on this node.")] = 1,
) -> None:
    """Check this node before the ranks start, for launch/; the first node prints the run's folder."""
    from bft_megatron.commands.preflight import preflight

    request = read(recipe_file, overrides)
    request.check(lambda: preflight(request.recipe, request.config, world, per_node))
    if os.environ.get("SLURM_PROCID", "0") == "0":
        print(f"run: {request.recipe.output}")


@app.command()
def doctor() -> None:
    """Report what a GPU run computes with here, and what a missing part costs. Exit status 1: a part is wrong."""
    from bft_megatron.installation.report import report

    if not report(Console(emoji=False)):
        sys.exit(1)


@app.command()
def plan(
    recipe_file: RecipeFile,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Default: as few as hold the model once.")] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 8,
    gpu: Annotated[str, typer.Option(help="h100-80g, h200, b200, a100-80g, a100-40g, or GiB of memory.")] = "h100-80g",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the report.")] = False,
    html: Annotated[Path | None, files.Option(metavar="FILE", help="Page to write: a step's memory over time.")] = None,
    expert_load: Annotated[
        float, typer.Option(min=1, help="Tokens on the fullest rank's experts, over the mean of all ranks.")
    ] = 1.5,
    search: Annotated[bool, typer.Option("--search", help="Rank the layouts of this many GPUs instead.")] = False,
) -> None:
    """Report whether the recipe fits a cluster and how fast it may run, without using one. Exit status 1: no fit."""
    from bft_megatron.plan import command

    request = command.read(recipe_file, overrides)
    cluster = command.cluster(request.recipe, nodes, gpus_per_node, gpu)
    if search:
        fits = command.search(request, cluster, expert_load, as_json=as_json)
    else:
        fits = command.run(request, cluster, expert_load, as_json=as_json, html=html)
    if not fits:
        sys.exit(1)


@app.command()
def export(
    run: Annotated[Path, files.Argument(metavar="RUN", help="The run's output folder.")],
    folder: Annotated[Path, files.Argument(metavar="HF_DIR", help="Folder to write, for transformers or vLLM.")],
    merge: Annotated[bool, typer.Option("--merge", help="For a LoRA run: base and adapters as one model.")] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Data type of the weights; default: unchanged."),
    ] = None,
    iteration: Annotated[int | None, typer.Option(help="Step of the checkpoint; default: the newest.")] = None,
) -> None:
    """Write a checkpoint of a run as a Hugging Face model; for a LoRA run, its adapters as a PEFT folder.

    If interrupted, the same command again resumes with the weights that are not written yet.
    """
    import torch

    source = RunFolder(run)
    chosen: torch.dtype | None = getattr(torch, dtype or "", None)
    recipe = reader.load(source.config) if source.config.exists() else None
    if recipe is not None and recipe.lora is not None:
        from bft_megatron.lora.peft import export_adapter, export_merged

        (export_merged if merge else export_adapter)(source, recipe, folder, iteration=iteration, dtype=chosen)
    elif merge:
        raise UserError("is no LoRA run: there is nothing to merge, leave out --merge", str(run))
    else:
        from bft_megatron.hf.export import export

        base = recipe.model if recipe is not None and recipe.init == "pretrained" else None
        export(source.checkpoints, folder, source.model, base=base, iteration=iteration, dtype=chosen)
    print(f"wrote {folder}")


@app.command()
def generate(
    folder: Annotated[Path, files.Argument(metavar="HF_DIR", help="A Hugging Face model folder.")],
    prompt: Annotated[str, typer.Argument(help="The user's message.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of the answer, in tokens.")] = 256,
) -> None:
    """Answer a prompt with a model, greedily, through transformers."""
    from bft_megatron.hf.generate import generate

    print(generate(folder, prompt, max_new_tokens))


@app.command("from-llamafactory")
def from_llamafactory(
    config: Annotated[Path, files.Argument(metavar="CONFIG.yaml", help="A config of `llamafactory-cli train`.")],
    recipe_file: Annotated[Path | None, files.Argument(metavar="[OUT.yaml]", help="Recipe to write.")] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs that the config runs on; its batch counts them.")
    ] = None,
) -> None:
    """Write the recipe that does the same as a LLaMA-Factory SFT config, and list what it could not carry over."""
    from bft_megatron.llamafactory import convert, print_table, recipe_text

    conversion = convert(config, gpus)
    text = recipe_text(conversion)
    print_table(conversion, Console(stderr=recipe_file is None, emoji=False))
    if recipe_file is None:
        print(text, end="")
        return
    files.write(recipe_file, text, "the recipe", new=True)


def main() -> None:
    """Run the command line; an error of the user or the file system is one line, with its `errors.status`.

    All ranks meet the same user error before training: rank 0 prints it. `processes.terminal` prints those in training.
    """
    sys.path.insert(0, "")  # so that `package.module:record` objectives are found from the working directory
    try:
        app()
    except (InUse, UserError, Unreadable, OSError) as e:
        if ranks.leads() or not isinstance(e, InUse | UserError):
            Console(stderr=True, emoji=False).print(f"[red]error:[/] {escape(str(e))}", soft_wrap=True, highlight=False)
        sys.exit(status(e))
