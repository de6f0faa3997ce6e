"""A run: its recipe, and the values that follow from it for a given number of processes, each computed once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bft_megatron.data.blend import Blend
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.folder import RunFolder
from bft_megatron.run.prepared import RunRows


@dataclass(frozen=True)
class Run:
    """A run, the same on all of its ranks.

    recipe: the recipe, checked for `world` processes.
    config, model_folder: the model's architecture, and the folder that holds its weights.
    rows: the prepared rows.
    world: the number of processes.
    """

    recipe: Recipe
    config: ModelConfig
    model_folder: Path
    rows: RunRows
    world: int

    @property
    def folder(self) -> RunFolder:
        """The run's output folder."""
        return RunFolder.of(self.recipe)

    @property
    def steps(self) -> int:
        """Steps of the whole run; the last step may be a partial batch."""
        return self.rows.steps

    @cached_property
    def validation(self) -> WholePass:
        """The shape of a validation, which reads all of its rows."""
        return WholePass.over(self.rows.valid, self.recipe, self.world)

    @property
    def best_metric(self) -> str:
        """The validation metric that decides which checkpoints are the best."""
        return self.recipe.train.best_metric or ("lm_loss" if self.recipe.objective.name == "sft" else "mean_p")


@dataclass(frozen=True)
class WholePass:
    """A number of iterations that together read every row once, whatever the weight of its source."""

    batch: int
    """Rows of an iteration."""
    iterations: int

    @classmethod
    def over(cls, rows: Blend | None, recipe: Recipe, world: int) -> WholePass:
        """Return the pass with the fewest filler rows that the layout allows; an empty pass if `rows` is None."""
        if rows is None:
            return cls(0, 0)
        count, data_parallel = sum(rows.sizes), world // recipe.parallel.model_parallel_size
        unit = recipe.train.micro_batch_size * data_parallel
        if recipe.parallel.virtual_pipeline > 1:
            unit *= recipe.parallel.pipeline  # the interleaved schedule needs a multiple of the pipeline size
        batch = min(recipe.train.global_batch_size, -(-count // unit) * unit)
        return cls(batch, -(-count // batch))
