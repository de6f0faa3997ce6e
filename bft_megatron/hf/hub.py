"""Where a model's files lie: a folder, a run's folder, or a model of the local hub cache. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

from bft_megatron.errors import UserError


def checkpoints_of(folder: Path) -> Path | None:
    """The torch_dist checkpoints that belong to a run's `model/` folder; None for a folder with weights of its own."""
    checkpoints = folder.parent / "checkpoints"
    return (
        checkpoints if folder.name == "model" and (folder / "config.json").exists() and checkpoints.is_dir() else None
    )


def find_model(name: str) -> Path:
    """Folder of a model given as a path or as a hub id, `organisation/name`: configuration, tokenizer, mostly weights.

    A folder with `model/` and `checkpoints/`, as a run leaves it, is a model too: `model/` holds what Hugging Face
    needs to know, the newest of the torch_dist checkpoints the weights.

    A download belongs before the job: compute nodes often have no network, and 64 ranks must not fetch the same files.

    Raises:
        UserError: neither a folder nor in the cache.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder / "model" if checkpoints_of(folder / "model") else folder
    is_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if is_id:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(name, local_files_only=True))
        except LocalEntryNotFoundError:
            pass
    hint = f", and it is not in the local hub cache; to download it: hf download {name}" if is_id else ""
    raise UserError(f"no such folder{hint}", f"model: {name}")
