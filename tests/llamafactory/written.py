"""Small configs for the tests, and the recipes that they become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bft_megatron.llamafactory import convert, recipe_text
from bft_megatron.recipe import reader
from bft_megatron.recipe.schema import Recipe

CONFIGS = Path(__file__).parent / "configs"
SMALLEST = {"model_name_or_path": "m", "finetuning_type": "full", "dataset": "d", "output_dir": "o"}


def written(folder: Path, **fields: Any) -> Path:
    """The smallest config of a full fine-tune with further fields; those that are None are left out."""
    path = folder / "config.yaml"
    given = {name: value for name, value in (SMALLEST | fields).items() if value is not None}
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(given)))
    return path


def loaded(config: Path, gpus: int | None = None) -> Recipe:
    """The converted recipe as `train` would read it."""
    path = config.with_suffix(".recipe")
    path.write_text(recipe_text(convert(config, gpus)))
    return reader.load(path)


def field(made: Recipe, name: str) -> Any:
    """A field of a recipe by its dotted name."""
    group, _, leaf = name.rpartition(".")
    holder = getattr(made, group) if group else made
    return holder[leaf] if isinstance(holder, dict) else getattr(holder, leaf)
