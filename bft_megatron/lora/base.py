"""Recording and checking the base model of a LoRA run: its checkpoints lack it, and every start needs the same one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from bft_megatron.errors import UserError
from bft_megatron.hf import hub, shards
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.hf.torch_dist import newest_checkpoint
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run import atomic
from bft_megatron.run.folder import RunFolder
from bft_megatron.textfiles import read_object

SAMPLES, SAMPLE_BYTES = 32, 4096
"""Number of places sampled in each file of weights, including the first and the last, and bytes at each."""


def fingerprint(folder: Path | None, config: ModelConfig, seed: int) -> str:
    """Return a hash of the model's configuration and of samples of every file of its weights; any training changes it.

    Args:
        folder: folder of the weights, or a run's `model/` (`hub.find_model`); None: weights drawn from `seed`.

    Raises:
        UserError: the folder has no complete model.
    """
    digest = hashlib.sha256(repr(config).encode())
    if folder is None:
        digest.update(str(seed).encode())
        return digest.hexdigest()
    for file in _weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as f:
            for i in range(SAMPLES):
                f.seek(max(size - SAMPLE_BYTES, 0) * i // (SAMPLES - 1))
                digest.update(f.read(SAMPLE_BYTES))
    return digest.hexdigest()


def record_base(run: RunFolder, recipe: Recipe, config: ModelConfig, folder: Path) -> None:
    """Record a LoRA run's base model in its folder, unless one is recorded already. Call it on one rank.

    Prints a line where a run goes on and has no record of the base that it began with.
    """
    if recipe.lora is None or run.base.exists():
        return
    if run.has_checkpoints():
        print(
            f"{run.base} is missing: nothing tells whether {recipe.model} has the weights that the adapters were "
            "trained on; from here on it is compared with these",
            flush=True,
        )
    noted = {"model": recipe.model, "fingerprint": fingerprint(_source(recipe, folder), config, recipe.train.seed)}
    atomic.write(run.base, json.dumps(noted, indent=2) + "\n")


def check_base(run: RunFolder, recipe: Recipe, config: ModelConfig, folder: Path | None) -> None:
    """Check that a run's checkpoints have adapters of the base model that the recipe names; without a record it passes.

    Raises:
        UserError: they have adapters of another base, or the record is damaged.
    """
    if recipe.lora is None or not run.saved_iteration() or not run.base.exists():
        return
    noted = read_object(run.base).get("fingerprint")
    if not isinstance(noted, str):
        raise UserError(
            "is damaged and does not tell which base this run's adapters were trained on; put it back, or delete it to "
            "go on without that check",
            str(run.base),
        )
    if noted != fingerprint(_source(recipe, folder), config, recipe.train.seed):
        raise UserError(
            f"the weights of {recipe.model} are not those that this run's adapters were trained on; put them back, or "
            "choose another output folder",
            str(run.base),
        )


def _source(recipe: Recipe, folder: Path | None) -> Path | None:
    return folder if recipe.init == "pretrained" else None


def _weight_files(folder: Path) -> list[Path]:
    checkpoints = hub.checkpoints_of(folder)
    if checkpoints:
        return sorted(newest_checkpoint(checkpoints).folder.glob("*.distcp"))
    return sorted({entry.file for entry in shards.read_headers(folder).values()})
