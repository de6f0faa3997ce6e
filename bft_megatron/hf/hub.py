"""Where a model's files lie: a folder, a run's folder, or a model of the local hub cache. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

from bft_megatron.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron's file in a folder of checkpoints, with the number of the newest."""


def checkpoints_of(folder: Path) -> Path | None:
    """The torch_dist checkpoints in a folder, or those that belong to a run's `model/`; None: it has other weights."""
    if (folder / TRACKER).exists():
        return folder
    checkpoints = folder.parent / "checkpoints"
    return (
        checkpoints if folder.name == "model" and (folder / "config.json").exists() and checkpoints.is_dir() else None
    )


def find_model(name: str) -> Path:
    """Folder of a model given as a path or as a hub id, `organisation/name`: configuration, tokenizer, mostly weights.

    A folder with `model/` and `checkpoints/`, as a run leaves it, is a model too: `model/` holds what Hugging Face
    needs to know, the newest of the torch_dist checkpoints the weights. So is a folder of Megatron's checkpoints into
    which config.json and the tokenizer's files were put.

    A download belongs before the job: compute nodes often have no network, and 64 ranks must not fetch the same files.

    Raises:
        UserError: neither a folder nor in the cache, or checkpoints without a configuration.
    """
    folder = Path(name)
    if (folder / TRACKER).exists() and not (folder / "config.json").exists():
        raise UserError(
            "holds checkpoints of Megatron's, which lack a tokenizer: put config.json and the tokenizer's files of the "
            "model on the hub beside them",
            f"model: {name}",
        )
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
