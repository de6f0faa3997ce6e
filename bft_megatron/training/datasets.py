"""The data sets of a run for Megatron's loop, and the rows of a step."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from bft_megatron.data.blend import Blend
from bft_megatron.data.dataset import training_order, training_rows, validation_rows
from bft_megatron.recipe.rules import model_parallel_size
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.prepared import RunRows


def rows_of_step(recipe: Recipe, rows: RunRows) -> Callable[[int], list[int]]:
    """Return a function from a step to the rows of its global batch, by their numbers in the prepared data."""
    order = training_order(rows.train, seed=recipe.train.seed, limit=rows.rows(recipe))
    batch = recipe.train.global_batch_size

    def of(step: int) -> list[int]:
        found = (order.row(place) for place in range((step - 1) * batch, step * batch))
        return [row for row in found if row is not None]

    return of


def validation_shape(recipe: Recipe, rows: Blend | None) -> tuple[int, int]:
    """Return the rows of a validation iteration and the iterations of a pass over the validation set.

    A pass reads every row once, whatever its source's weight, with as few filler rows as the layout allows.
    """
    if rows is None:
        return 0, 0
    count, data_parallel = sum(rows.sizes), int(os.environ["WORLD_SIZE"]) // model_parallel_size(recipe)
    unit = recipe.train.micro_batch_size * data_parallel
    if recipe.parallel.virtual_pipeline > 1:
        unit *= recipe.parallel.pipeline  # the interleaved schedule needs a multiple of PP micro-batches
    size = min(recipe.train.global_batch_size, -(-count // unit) * unit)
    return size, -(-count // size)


def datasets(recipe: Recipe, rows: RunRows, validation: tuple[int, int]) -> Callable[..., tuple[Any, Any, None]]:
    """Return Megatron's data set provider. Every rank on every pipeline stage reads its rows itself: no broadcast."""

    def provide(num_samples: Any, vp_stage: int | None = None) -> tuple[Any, Any, None]:
        train = training_rows(rows.train, seed=recipe.train.seed, limit=rows.rows(recipe))
        valid = validation_rows(rows.valid, batch=validation[0]) if validation[0] else None
        return train, valid, None

    provide.is_distributed = True
    return provide
