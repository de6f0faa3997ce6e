"""Locating a model's files: a folder, a run's folder, or a model of the local hub cache. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

from bft_megatron.errors import FieldError, UserError, reading
from bft_megatron.recipe import reader

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron's tracker file in a folder of checkpoints: the iteration of the newest."""


def checkpoints_of(folder: Path) -> Path | None:
    """Return the folder of a model's torch_dist checkpoints, itself or beside `model/`; None if it has none."""
    if (folder / TRACKER).exists():
        return folder
    checkpoints = folder.parent / "checkpoints"
    return (
        checkpoints if folder.name == "model" and (folder / "config.json").exists() and checkpoints.is_dir() else None
    )


def origin(name: str) -> Path:
    """Return the folder of files that a model's weights go back to, given a path or an `organisation/name`.

    That is the model's folder, or for a run, or a converted model, that of its recipe's model. It may be gone.
    """
    try:
        folder = find_model(name)
        if checkpoints_of(folder) in (None, folder):
            return folder
        recipe = reader.load(folder.parent / "config.yaml")
    except (FieldError, UserError):
        return Path(name)
    return origin(recipe.model)


def find_model(name: str) -> Path:
    """Return the folder of a model (configuration, tokenizer, mostly weights), given a path or an `organisation/name`.

    A run's folder, with `model/` and `checkpoints/`, is a model too: `model/` has the files for Hugging Face, the
    newest torch_dist checkpoint the weights. So is a folder of Megatron checkpoints with config.json and the
    tokenizer's files beside them.

    Download models before the job: compute nodes often have no network, and 64 ranks must not fetch the same files.

    Raises:
        FieldError: of `model`: neither a folder nor in the cache, or checkpoints without a configuration.
    """
    with reading(name, "model"):
        return _find_model(name)


def _find_model(name: str) -> Path:
    folder = Path(name)
    if (folder / TRACKER).exists() and not (folder / "config.json").exists():
        raise FieldError(
            "model",
            f"{name}: holds checkpoints of Megatron's, which lack a tokenizer: put config.json and the tokenizer's "
            "files of the model on the hub beside them",
        )
    if folder.is_dir():
        return folder / "model" if checkpoints_of(folder / "model") else folder
    is_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if is_id:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(name, local_files_only=True))
        except LocalEntryNotFoundError:
            pass
        except HFValidationError:
            is_id = False
    hint = f", and it is not in the local hub cache; to download it: hf download {name}" if is_id else ""
    raise FieldError("model", f"{name}: no such folder{hint}")
