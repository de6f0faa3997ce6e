"""The folder of a run: its paths, its resolved recipe, and the check that a new command may resume the run in it.

config.yaml      the recipe with every default     metrics.jsonl  one line per step
checkpoints/     Megatron's torch_dist format      tensorboard/   the same numbers as curves
data/            the packed rows                   model/         config, tokenizer and template for the export
logs/            the output of each rank           hf/            kept checkpoints as Hugging Face models
trained_on.json  the training rows that the run began with
unfinished       exists until the run is complete; its line says why the last process stopped
streak.json      steps that were not finite when the last process stopped (`checkpoint.streak`)
lease/           exists while a command writes here; its file names that
done             exists once the last step is saved
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from bft_megatron.errors import FieldError
from bft_megatron.hf import hub, seal
from bft_megatron.hf.architectures import companions
from bft_megatron.recipe import layout_rules, reader
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run import atomic
from bft_megatron.run.changes import changed

RUNNING = "running"
"""The mark of a run whose process is running, or was killed."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's output folder."""

    root: Path

    @classmethod
    def of(cls, recipe: Recipe) -> RunFolder:
        """Return the folder that the recipe names as its output."""
        return cls(Path(recipe.output))

    @property
    def config(self) -> Path:
        """The resolved recipe."""
        return self.root / "config.yaml"

    @property
    def trained_on(self) -> Path:
        """The record of the training rows that the run began with (`run.trained_on`)."""
        return self.root / "trained_on.json"

    @property
    def metrics(self) -> Path:
        """The reports of the steps and validations, one JSON object per line."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of all checkpoints."""
        return self.root / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """The folder of the TensorBoard logs."""
        return self.root / "tensorboard"

    @property
    def data(self) -> Path:
        """The folder of the packed rows."""
        return self.root / "data"

    @property
    def model(self) -> Path:
        """The folder of the model's config, stop tokens, tokenizer and template, which the export copies."""
        return self.root / "model"

    @property
    def plan(self) -> Path:
        """The output of `bft-megatron plan --json`, if the user saved it here."""
        return self.root / "plan.json"

    @property
    def lease(self) -> Path:
        """The folder with the lease of the command that uses this one (`processes.lease`)."""
        return self.root / "lease"

    @property
    def base(self) -> Path:
        """The record of the base weights to which a LoRA run's adapters belong (`lora.base`)."""
        return self.root / "base.json"

    def log(self, rank: int) -> Path:
        """Return the log of a rank, with Megatron's own output."""
        return self.root / "logs" / f"rank-{rank:05d}.log"

    @property
    def tracker(self) -> Path:
        """Megatron's file with the number of the newest checkpoint."""
        return self.checkpoints / hub.TRACKER

    def write_tracker(self, iteration: int) -> None:
        """Write the number of the newest checkpoint atomically."""
        atomic.write(self.tracker, str(iteration))

    def tracked(self) -> int | None:
        """Return the number in the tracker; None if there is no such file or it holds no number. Raises OSError."""
        try:
            content = self.tracker.read_bytes().strip()
        except (FileNotFoundError, IsADirectoryError):
            return None
        return int(content) if content.isdigit() and len(content) < 20 else None

    def checkpoint(self, iteration: int) -> Path:
        """Return the folder of the checkpoint of an iteration."""
        return self.checkpoints / f"iter_{iteration:07d}"

    @property
    def hf_copies(self) -> Path:
        """The folder of the checkpoints as Hugging Face models, which `train.save_hf` writes."""
        return self.root / "hf"

    def hf_copy(self, iteration: int) -> Path:
        """Return the folder of an iteration's checkpoint as a Hugging Face model."""
        return self.hf_copies / self.checkpoint(iteration).name

    @property
    def converted(self) -> Path:
        """The checkpoint that `convert` writes: weights alone, in the folder that Megatron calls `release`."""
        return self.checkpoints / "release"

    def iterations(self) -> list[int]:
        """Return the iterations of all checkpoint folders, complete or not, in no particular order.

        Other names are left alone: `iter_0000002.bak`, `iter_²`. Raises OSError if the folder cannot be read.
        """
        found = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        names = (path.name.removeprefix("iter_") for path in found if path.name.startswith("iter_"))
        return [i for i in map(int, filter(_is_number, names)) if self.checkpoint(i).is_dir()]

    def saved_iteration(self) -> int:
        """Return the iteration of the newest checkpoint whose save completed; 0 if there is none.

        Does not check that its files are still intact; a training rank does (`checkpoint.recovery`).
        """
        return max(filter(self.was_finished, self.iterations()), default=0)

    def was_finished(self, iteration: int) -> bool:
        """Return whether the save of a checkpoint completed: Megatron writes `metadata.json` last, then we the seal."""
        return any((self.checkpoint(iteration) / name).exists() for name in ("metadata.json", seal.SEAL))

    def is_done(self, steps: int) -> bool:
        """Return whether the run is complete and its last checkpoint has all its files."""
        return (self.root / "done").exists() and seal.is_complete(self.checkpoint(steps))

    def stopped(self) -> str | None:
        """Return why the last process saved and stopped before the end of the run; None if it did not."""
        mark = self.root / "unfinished"
        why = mark.read_text().strip() if mark.exists() else RUNNING
        return None if why == RUNNING else why

    def mark_unfinished(self, why: str) -> None:
        """Mark the run as unfinished.

        Args:
            why: why the last process stopped; `running` if it is running or was killed.
        """
        atomic.write(self.root / "unfinished", f"{why}\n")
        (self.root / "done").unlink(missing_ok=True)

    def mark_done(self) -> None:
        """Mark the run as done: its last step is saved."""
        atomic.write(self.root / "done", "")
        (self.root / "unfinished").unlink(missing_ok=True)

    def with_pack(self, recipe: Recipe) -> Recipe:
        """Return the recipe with `data.pad_multiple` set: the run's value if it has checkpoints, else the default.

        The packed rows and their order therefore stay the same when the layout changes.

        Raises:
            FieldError: the run's packed rows cannot be split for the recipe's context-parallel size.
        """
        if recipe.data.pad_multiple is not None:
            return recipe
        multiple = layout_rules.pad_multiple(recipe)
        if self.goes_on():
            multiple, chunks = reader.load(self.config).data.pad_multiple or multiple, multiple
            if multiple % chunks:
                raise FieldError(
                    "parallel.context",
                    f"{self.root} holds checkpoints of a run whose samples are padded to a multiple of {multiple}, and "
                    f"context {recipe.parallel.context} needs {chunks}: go on with a context that fits, or begin anew "
                    f"in another output folder with data.pad_multiple={chunks}",
                )
        return replace(recipe, data=replace(recipe.data, pad_multiple=multiple))

    def has_checkpoints(self) -> bool:
        """Return whether a run has left checkpoints here."""
        return self.tracker.exists() or self.saved_iteration() > 0

    def goes_on(self) -> bool:
        """Return whether a run has left checkpoints here. Raises FieldError if their recipe is gone."""
        if not self.has_checkpoints():
            return False
        if not self.config.exists():
            message = f"{self.root} holds checkpoints without config.yaml: put it back, or choose another output folder"
            raise FieldError("output", message)
        return True

    def check_continues(self, recipe: Recipe) -> None:
        """Raise FieldError if this folder holds a converted model, or a run whose results the recipe would change."""
        if (self.converted / "metadata.json").exists():
            raise FieldError(
                "output",
                f"{self.root} holds a converted model and no run: choose another folder (a recipe's `model` may be "
                "this one)",
            )
        if not self.goes_on():
            return
        for field, was, wanted in changed(reader.load(self.config), recipe):
            raise FieldError(
                field,
                f"{self.root} holds checkpoints of a run with {field} {was}, not {wanted}: set it back to go on with "
                f"that run, or choose another output folder{self._way_on(field, recipe)}",
            )

    def _way_on(self, field: str, recipe: Recipe) -> str:
        """Return advice on training a finished run further: its schedule has ended, so it takes a new run."""
        if field not in ("train.iterations", "train.epochs") or not (self.root / "done").exists():
            return ""
        if recipe.lora is not None:
            return "; to train its adapters further, export them and set lora.adapter to their folder there"
        drawn = " and init=pretrained" if recipe.init == "random" else ""
        return f"; to train its model further, set model={self.root}{drawn} there"

    def check_converts(self, recipe: Recipe) -> None:
        """Raise FieldError if the folder holds a run, or if the recipe has adapters, which a conversion would omit."""
        if self.saved_iteration():
            raise FieldError("output", f"{self.root} holds checkpoints of a run: choose another folder")
        if recipe.lora is not None:
            raise FieldError("lora", "a conversion writes the model's own weights: leave it out (lora=null)")

    def write_config(self, recipe: Recipe, model_folder: Path) -> None:
        """Write the resolved recipe, and copy the config, tokenizer and template, which an export needs, atomically."""
        self.root.mkdir(parents=True, exist_ok=True)
        atomic.write(self.config, reader.dump(recipe))
        self.model.mkdir(exist_ok=True)
        for file in companions(model_folder):
            atomic.copy(file, self.model / file.name)


def _is_number(name: str) -> bool:
    """Return whether a name consists of a few ASCII digits: `int` takes others, or refuses what `isdigit` takes."""
    return name.isascii() and name.isdigit() and len(name) < 20
