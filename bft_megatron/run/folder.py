"""The folder of a run: where things lie in it, its resolved recipe, and whether a new command continues, repeats or
contradicts it.

config.yaml      the recipe with every default     metrics.jsonl  a line a step
checkpoints/     Megatron's torch_dist format      tensorboard/   the same numbers as curves
data/            the packed rows                   model/         config, tokenizer and template for the export
logs/            what each rank printed            hf/            kept checkpoints as Hugging Face models
unfinished       from the start of the run until it is complete, with a line: why the last process stopped
done             from the save of the last step on
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from bft_megatron.errors import FieldError
from bft_megatron.hf import hub
from bft_megatron.hf.architectures import companions
from bft_megatron.recipe import flags, reader, rules
from bft_megatron.recipe.schema import Recipe

# What may differ when a run resumes: what leaves its numbers alone, or changes no more than their rounding. What is
# trained on what rows in what order, the schedule, the optimizer and the precision stay. Of the flags under `megatron`,
# `recipe.flags` knows.
MAY_CHANGE = {
    "data.valid",
    "objective.head",
    "objective.chunk_size",
    "objective.kernels",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "parallel.context",
    "parallel.data",
    "parallel.sequence",
    "train.micro_batch_size",
    "train.save_every",
    "train.validate_every",
    "train.exit_after",
    "train.keep_last",
    "train.keep_best",
    "train.best_metric",
    "train.max_skipped",
    "train.save_hf",
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

    @property
    def plan(self) -> Path:
        """What `bft-megatron plan --json` said, where somebody kept it here."""
        return self.root / "plan.json"

    @property
    def base(self) -> Path:
        """Of a LoRA run: which weights its adapters belong to (`lora.base`)."""
        return self.root / "base.json"

    def log(self, rank: int) -> Path:
        """What a rank printed, Megatron's thousand lines included."""
        return self.root / "logs" / f"rank-{rank:05d}.log"

    @property
    def tracker(self) -> Path:
        """Megatron's file with the number of the newest checkpoint."""
        return self.checkpoints / hub.TRACKER

    def write_tracker(self, iteration: int) -> None:
        """At once, or not at all."""
        _write(self.tracker, str(iteration))

    def checkpoint(self, iteration: int) -> Path:
        return self.checkpoints / f"iter_{iteration:07d}"

    @property
    def hf_copies(self) -> Path:
        """Checkpoints as Hugging Face models, where `train.save_hf` asks for them."""
        return self.root / "hf"

    def hf_copy(self, iteration: int) -> Path:
        return self.hf_copies / self.checkpoint(iteration).name

    @property
    def converted(self) -> Path:
        """A checkpoint of weights alone, under Megatron's name for one (`convert`)."""
        return self.checkpoints / "release"

    def iterations(self) -> list[int]:
        """Of all checkpoint folders, in no order, saved to the end or not."""
        names = (path.name.removeprefix("iter_") for path in self.checkpoints.glob("iter_*"))
        return [int(name) for name in names if name.isdigit()]

    def saved_iteration(self) -> int:
        """Iteration of the newest checkpoint that was saved to its end, 0 where there is none yet.

        Whether its files are whole still is not looked at here: a training rank does (`checkpoint.recovery`).
        """
        return max((i for i in self.iterations() if (self.checkpoint(i) / "metadata.json").exists()), default=0)

    def is_done(self, steps: int) -> bool:
        """Whether the run is complete, its last checkpoint in place."""
        return (self.root / "done").exists() and self.saved_iteration() >= steps

    def mark_unfinished(self, why: str) -> None:
        """Say that the run has steps left to do, and why the last process stopped (`running`: it did not, or died)."""
        _write(self.root / "unfinished", f"{why}\n")
        (self.root / "done").unlink(missing_ok=True)

    def mark_done(self) -> None:
        """Say that the last step is saved."""
        _write(self.root / "done", "")
        (self.root / "unfinished").unlink(missing_ok=True)

    def with_pack(self, recipe: Recipe) -> Recipe:
        """The recipe with `data.pad_multiple` filled in: as the run began where it has checkpoints, else its default.

        The pack, and with it the order of the rows, stays when the layout changes.

        Raises:
            FieldError: the pack of this run cannot be cut for the recipe's context-parallel size.
        """
        if recipe.data.pad_multiple is not None:
            return recipe
        multiple = rules.pad_multiple(recipe)
        if self._continues():
            multiple, chunks = reader.load(self.config).data.pad_multiple or multiple, multiple
            if multiple % chunks:
                raise FieldError(
                    "parallel.context",
                    f"{self.root} holds checkpoints of a run whose samples are padded to a multiple of {multiple}, and "
                    f"context {recipe.parallel.context} needs {chunks}: go on with a context that fits, or begin anew "
                    f"in another output folder with data.pad_multiple={chunks}",
                )
        return replace(recipe, data=replace(recipe.data, pad_multiple=multiple))

    def _continues(self) -> bool:
        return self.config.exists() and (self.tracker.exists() or self.saved_iteration() > 0)

    def check_continues(self, recipe: Recipe) -> None:
        """Raise FieldError where this folder holds a run that the recipe would change, or a converted model."""
        if (self.converted / "metadata.json").exists():
            raise FieldError(
                "output",
                f"{self.root} holds a converted model and no run: choose another folder (a recipe's `model` may be "
                "this one)",
            )
        if not self._continues():
            return
        before, now = _flat(reader.load(self.config)), _flat(recipe)
        for field in sorted(before.keys() | now.keys()):
            if before.get(field) != now.get(field) and not _may_change(field):
                was, wanted = (_shown(field, values.get(field)) for values in (before, now))
                raise FieldError(
                    field,
                    f"{self.root} holds checkpoints of a run with {field} {was}, not {wanted}: set it back to go on "
                    f"with that run, or choose another output folder{self._way_on(field, recipe)}",
                )

    def _way_on(self, field: str, recipe: Recipe) -> str:
        """What to do where a finished run is asked for other steps: its schedule has ended, so another run begins."""
        if field not in ("train.iterations", "train.epochs") or not (self.root / "done").exists():
            return ""
        if recipe.lora is not None:
            return "; to train its adapters further, export them and set lora.adapter to their folder there"
        drawn = " and init=pretrained" if recipe.init == "random" else ""
        return f"; to train its model further, set model={self.root}{drawn} there"

    def check_converts(self, recipe: Recipe) -> None:
        """Raise FieldError where a converted model cannot be written here, or would not be the recipe's model."""
        if self.saved_iteration():
            raise FieldError("output", f"{self.root} holds checkpoints of a run: choose another folder")
        if recipe.lora is not None:
            raise FieldError("lora", "a conversion writes the model's own weights: leave it out (lora=null)")

    def write_config(self, recipe: Recipe, model_folder: Path) -> None:
        """Write the resolved recipe, and keep what an export needs beside the weights: config, tokenizer, template."""
        self.root.mkdir(parents=True, exist_ok=True)
        _write(self.config, reader.dump(recipe))  # at once: other ranks may be reading it
        self.model.mkdir(exist_ok=True)
        for file in companions(model_folder):
            shutil.copyfile(file, self.model / file.name)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _may_change(field: str) -> bool:
    group, _, flag = field.partition(".")
    return flags.may_change(flag) if group == "megatron" else field in MAY_CHANGE


def _shown(field: str, value: object) -> object:
    return "left out" if value is None and field.startswith("megatron.") else value


def _flat(recipe: Recipe) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in vars(recipe).items():
        if name == "megatron":
            flat |= {f"{name}.{flag}": v for flag, v in value.items() if not flags.is_left_out(flag, v)}
        elif hasattr(value, "__dict__"):
            flat |= {f"{name}.{k}": v for k, v in vars(value).items()}
        else:
            flat[name] = value
    return flat
