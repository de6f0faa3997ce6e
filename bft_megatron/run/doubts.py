"""What a recipe and its rows may, but are unlikely to, mean; it is said before the run starts."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.prepared import RunRows

MOST_PASSES = 1000
"""Passes over the training rows in one step, above which the batch is taken for a slip."""


def doubts(recipe: Recipe, rows: RunRows) -> list[str]:
    """Return a sentence for each doubt, with the field or column that it is about."""
    found, batch = [], recipe.train.global_batch_size
    if batch > MOST_PASSES * rows.train.rows:
        found.append(
            f"train.global_batch_size: a step reads {batch:,} rows, {batch // rows.train.rows:,} times the "
            f"{rows.train.rows:,} of data.train"
        )
    if not any(_has_weight(part.prepared.folder) for part in rows.train.parts):
        found.append("data.train: every conversation's `weight` is 0, so nothing is learned")
    return found


def _has_weight(folder: Path) -> bool:
    """Return whether a prepared source has a sample with a weight above 0; reads no further than the first."""
    with pa.memory_map(str(folder / "samples.arrow")) as file, pa.ipc.open_stream(file) as batches:
        return any((pc.max(batch["weight"]).as_py() or 0) > 0 for batch in batches)
