"""The data sets of a run for Megatron's loop, and the rows of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bft_megatron.data.dataset import training_order, training_rows, validation_rows
from bft_megatron.run.resolved import Run


def rows_of_step(run: Run) -> Callable[[int], list[int]]:
    """Return a function: step -> the rows of its global batch, by their numbers in the prepared data."""
    order = training_order(run.rows.train, seed=run.recipe.train.seed, limit=run.rows.total)
    batch = run.recipe.train.global_batch_size

    def of(step: int) -> list[int]:
        found = (order.row(place) for place in range((step - 1) * batch, step * batch))
        return [row for row in found if row is not None]

    return of


def datasets(run: Run) -> Callable[..., tuple[Any, Any, None]]:
    """Return Megatron's data set provider. Every rank of every pipeline stage reads its rows itself: no broadcast."""

    def provide(num_samples: Any, vp_stage: int | None = None) -> tuple[Any, Any, None]:
        train = training_rows(run.rows.train, seed=run.recipe.train.seed, limit=run.rows.total)
        valid = None
        if run.rows.valid is not None:
            valid = validation_rows(run.rows.valid, batch=run.validation.batch)
        return train, valid, None

    provide.is_distributed = True  # type: ignore[attr-defined]  # Megatron's mark on a function
    return provide
