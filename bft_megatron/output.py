"""The folder of a run: where things lie in it, its resolved recipe, and whether a new command continues, repeats or
contradicts it.

config.yaml      the recipe with every default     metrics.jsonl  a line a step
checkpoints/     Megatron's torch_dist format      tensorboard/   the same numbers as curves
data/            the packed rows                   model/         config, tokenizer and template for the export
logs/            what each rank printed
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from bft_megatron import recipe as recipes
from bft_megatron.errors import FieldError, UserError
from bft_megatron.hf.architectures import companions
from bft_megatron.recipe import Recipe

# What may differ when a run goes on: the layout and how often it saves, looks and runs, not what is trained on what.
MAY_CHANGE = {
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "parallel.context",
    "parallel.data",
    "parallel.sequence",
    "train.micro_batch_size",
    "train.save_every",
    "train.validate_every",
    "device",
    "output",
}


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's output folder."""

    root: Path

    @classmethod
    def of(cls, recipe: Recipe) -> RunFolder:
        return cls(Path(recipe.output))

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def model(self) -> Path:
        return self.root / "model"

    def log(self, rank: int) -> Path:
        """What a rank printed, Megatron's thousand lines included."""
        return self.root / "logs" / f"rank-{rank:05d}.log"

    def saved_iteration(self) -> int:
        """Iteration of the newest checkpoint, 0 where there is none yet.

        Raises:
            UserError: the file that names it is damaged.
        """
        tracker = self.checkpoints / "latest_checkpointed_iteration.txt"
        if not tracker.exists():
            return 0
        text = tracker.read_text().strip()
        if not text.isdigit():
            raise UserError(
                f"should hold the number of the newest checkpoint, not {text!r}; write it there", str(tracker)
            )
        return int(text)

    def check_continues(self, recipe: Recipe) -> None:
        """Raise FieldError where this folder holds checkpoints of a run that the recipe would change."""
        if not self.saved_iteration() or not self.config.exists():
            return
        before, now = _flat(recipes.load(self.config)), _flat(recipe)
        for field in sorted(before.keys() | now.keys()):
            if before.get(field) != now.get(field) and field not in MAY_CHANGE:
                raise FieldError(
                    field,
                    f"{self.root} holds checkpoints of a run with {field} {before.get(field)}, not {now.get(field)}: "
                    "set it back to go on with that run, or choose another output folder",
                )

    def write_config(self, recipe: Recipe, model_folder: Path) -> None:
        """Write the resolved recipe, and keep what an export needs beside the weights: config, tokenizer, template."""
        self.root.mkdir(parents=True, exist_ok=True)
        temporary = self.config.with_suffix(".tmp")
        temporary.write_text(recipes.dump(recipe))
        temporary.replace(self.config)  # at once: other ranks may be reading it
        self.model.mkdir(exist_ok=True)
        for file in companions(model_folder):
            shutil.copyfile(file, self.model / file.name)


def _flat(recipe: Recipe) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in vars(recipe).items():
        if hasattr(value, "__dict__"):
            flat |= {f"{name}.{k}": v for k, v in vars(value).items()}
        else:
            flat[name] = value
    return flat
