"""One rank of `bft-megatron score`: write the model's confidence in every sample and the objective's weight of it.

All rows go once through the recipe's own layout, without gradients. A sample gets the same numbers that a training step
would compute for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.utils.data import default_collate

from bft_megatron.data.blend import Blend
from bft_megatron.data.columns import Columns
from bft_megatron.data.dataset import RowDataset, validation_rows
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.processes import ranks
from bft_megatron.reading.sources import open_source
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.resolved import WholePass
from bft_megatron.training.measuring import Measured
from bft_megatron.training.model import build, forward
from bft_megatron.training.step import Step

NUMBERS = ("tokens", "lm_loss", "mean_p", "accuracy", "confidence", "weight")
"""Numbers of a sample: its supervised tokens, means over them, c_b, and the objective's s_b, without data weights."""
LEAST_SURE = 5
"""The number of samples of lowest confidence that the summary lists."""

Score = dict[str, Any]
"""A sample's `source`, `where` (file and line) and NUMBERS."""


class Scores:
    """The numbers of every sample that a step measures."""

    def __init__(self) -> None:
        self.found: list[tuple[Tensor, Tensor]] = []
        """For each micro-batch, on the CPU: the rows of its samples [B] int64 and their NUMBERS [B, 6] fp64."""

    def keep(self, batch: Columns, m: Measured) -> None:
        """Keep the numbers of a micro-batch's samples. Collectives over CP: three SUM all-reduces [B]."""
        means = [m.view.mean(x) for x in (-m.view.logp, m.view.logp.double().exp(), m.geometry.take(m.correct))]
        numbers = torch.stack([x.double() for x in (m.view.n, *means, m.confidence, m.result.sample_weight)], dim=1)
        row = batch.row if batch.cu_seqlens is None else batch.row.expand(len(m.geometry.counted))
        self.found.append((row[m.geometry.counted], numbers.cpu()[m.geometry.counted]))


def run(
    recipe: Recipe,
    config: ModelConfig,
    model_folder: Path,
    blend: Blend,
    data: Literal["train", "valid"],
    out: Path,
    console: TextIO,
) -> None:
    """Score every sample once, whatever its source's weight, and write one line of JSON each, in the order of the rows.

    Args:
        blend: the prepared rows of the recipe's `data.train` or `data.valid`.
        data: which of the two they are.
        out: the file that the last rank writes; it appears when it is complete.
        console: the terminal, for the progress bar and the summary.

    Raises:
        UserError, FieldError: as for `build`.
    """
    whole = WholePass.over(blend, recipe, ranks.world_size())
    dataset, kept = validation_rows(blend, batch=whole.batch), Scores()
    step = Step(recipe.objective, config.vocab_size, kept.keep)
    chunks = [chunk.eval() for chunk in build(recipe, config, model_folder)]
    for first in _progress(whole.iterations, console):
        batches = _batches(
            dataset, range(first * whole.batch, (first + 1) * whole.batch), recipe.train.micro_batch_size
        )
        forward(chunks, batches, step.forward, recipe)
    found = _gather(kept)
    if dist.get_rank() == dist.get_world_size() - 1:
        files = [open_source(source).files for source in recipe.data.sources(data)]
        scores = _scores(*found, dataset, files)
        part = out.with_name(f"{out.name}.tmp")
        part.write_text("".join(json.dumps(score) + "\n" for score in scores), encoding="utf-8")
        part.replace(out)
        _summarise(scores, blend.names, Console(file=console, width=100, emoji=False))
        print(f"wrote {out}", file=console, flush=True)
    dist.destroy_process_group()


def _progress(passes: int, console: TextIO) -> Iterator[int]:
    """Yield 0 to passes - 1, with a progress bar on the last rank if the console is a terminal."""
    looks = console.isatty() and dist.get_rank() == dist.get_world_size() - 1
    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=console), disable=not looks, transient=True) as progress:
        yield from progress.track(range(passes))


def _batches(dataset: RowDataset, places: range, b: int) -> list[dict[str, Tensor]]:
    """Return this data-parallel rank's share of some places of the data set, in micro-batches of b rows."""
    from megatron.core import parallel_state

    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    own = [places[i : i + b] for i in range(rank * b, len(places), size * b)]
    return [default_collate([dataset[place] for place in batch]) for batch in own]


def _gather(kept: Scores) -> tuple[Tensor, Tensor]:
    """Gather rows [B] and NUMBERS [B, 6] of all samples, sorted by row, on the last stage.

    One all_gather_object over data parallelism.
    """
    from megatron.core import parallel_state

    if not kept.found:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, len(NUMBERS))
    own = tuple(torch.cat(parts) for parts in zip(*kept.found, strict=True))
    shares: list[Any] = [None] * parallel_state.get_data_parallel_world_size()
    dist.all_gather_object(shares, own, group=parallel_state.get_data_parallel_group())
    row, numbers = (torch.cat(parts) for parts in zip(*shares, strict=True))
    order = row.argsort(stable=True)  # all samples of a row come from one rank, in order
    return row[order], numbers[order]


def _scores(row: Tensor, numbers: Tensor, dataset: RowDataset, files: list[tuple[str, ...]]) -> list[Score]:
    origins = [origin for number in row.unique_consecutive().tolist() for origin in dataset.origins(number)]
    return [
        {"source": dataset.blend.names[source], "where": f"{files[source][file]}:{line}"}
        | dict(zip(NUMBERS, (int(tokens), *rest), strict=True))
        for (source, file, line), (tokens, *rest) in zip(origins, numbers.tolist(), strict=True)
    ]


def _summarise(scores: list[Score], sources: tuple[str, ...], console: Console) -> None:
    """Print one line for each source, and the samples of lowest confidence."""
    table = Table("", "samples", "tokens", "lm loss", "mean p", "c: lowest tenth", "median", "highest tenth", "weight")
    for source in sources:
        own = [score for score in scores if score["source"] == source]
        if not own:
            continue
        n = [score["tokens"] for score in own]
        lm_loss, p = (
            sum(score[name] * k for score, k in zip(own, n, strict=True)) / sum(n) for name in ("lm_loss", "mean_p")
        )
        c = torch.tensor([score["confidence"] for score in own], dtype=torch.float64)
        low, middle, high = c.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
        weight = sum(score["weight"] for score in own) / len(own)
        numbers = (f"{x:.4f}" for x in (lm_loss, p, low, middle, high, weight))
        table.add_row(escape(source), f"{len(own):,}", f"{sum(n):,}", *numbers)
    console.print(table)
    console.print("least sure of:")
    for score in sorted(scores, key=lambda score: score["confidence"])[:LEAST_SURE]:
        console.print(
            f"  c {score['confidence']:.4f}  {score['tokens']:,} tokens  {score['where']}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
