"""Where a model's files lie: a folder, or a model of the local hub cache. Nothing is downloaded here."""

from __future__ import annotations

from pathlib import Path

from bft_megatron.errors import UserError


def find_model(name: str) -> Path:
    """Folder of a model given as a path or as a hub id, `organisation/name`.

    A download belongs before the job: compute nodes often have no network, and 64 ranks must not fetch the same files.

    Raises:
        UserError: neither a folder nor in the cache.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
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
