"""Recording and checking the base model of a LoRA run: its checkpoints lack it, and every start needs the same one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from bft_megatron.errors import UserError
from bft_megatron.hf import hub, shards
from bft_megatron.hf.architectures import ModelConfig
from bft_megatron.hf.torch_dist import newest_checkpoint
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.folder import RunFolder

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
    """Record a LoRA run's base model in its folder, unless one is recorded already. Call it on one rank."""
    if recipe.lora is None or run.base.exists():
        return
    noted = {"model": recipe.model, "fingerprint": fingerprint(_source(recipe, folder), config, recipe.train.seed)}
    temporary = run.base.with_suffix(".tmp")
    temporary.write_text(json.dumps(noted, indent=2) + "\n")
    temporary.replace(run.base)


def check_base(run: RunFolder, recipe: Recipe, config: ModelConfig, folder: Path | None) -> None:
    """Raise UserError if the run's checkpoints have adapters of another base model than the recipe now names."""
    if recipe.lora is None or not run.saved_iteration() or not run.base.exists():
        return
    noted = json.loads(run.base.read_text())["fingerprint"]
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
