"""Reading LLaMA-Factory's dataset_info.json: an entry becomes the settings of a source."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from bft_megatron.errors import FieldError
from bft_megatron.recipe.sources import SourceSettings

NAME = "dataset_info.json"

_COLUMNS = {"prompt", "query", "response", "history", "messages", "system", "tools"}
_ROLES = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "function_call"),
    "system_tag": ("system", "system"),
}
_REFUSED = {
    "ranking": "holds preferences, not answers",
    "num_samples": "draws samples: write them to a file of their own, or set the source's `weight`",
    "kto_tag": "holds preferences, not answers",
    "images": "holds images",
    "videos": "holds videos",
    "audios": "holds audio",
    "script_url": "is built by a script: run it and name the files that it writes",
    "cloud_file_name": "lies on a cloud store: name a local copy",
}


def resolve(settings: SourceSettings, field: str) -> SourceSettings:
    """Return the source that the entry `settings.name` describes; fields that the recipe sets win over the entry's.

    Raises:
        FieldError: no such entry, or an entry that a text fine-tune cannot train on.
    """
    path = Path(settings.path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise FieldError(field, f"{path} is not JSON: {e}") from None
    if not isinstance(entries, dict) or not isinstance(entry := entries.get(settings.name), dict):
        names = ", ".join(entries)[:200] if isinstance(entries, dict) else "none"
        raise FieldError(field, f"{path} has no data set {settings.name}; set the source's `name` to one of {names}")
    columns = entry.get("columns", {})
    for key, reason in _REFUSED.items():
        if entry.get(key) or columns.get(key):
            raise FieldError(field, f"{path}: {settings.name} {reason} (`{key}`)")
    tags = entry.get("tags", {})
    sharegpt = entry.get("formatting", "alpaca") in ("sharegpt", "openai")  # they differ in their tags only
    named = {key: value for key, value in columns.items() if key in _COLUMNS and value}
    if sharegpt:
        named |= {key: tags[f"{key}_tag"] for key in ("role", "content") if f"{key}_tag" in tags}
    return replace(
        settings,
        path=_path(path, entry, settings.name, field),
        subset=settings.subset or entry.get("subset"),
        split=entry.get("split", settings.split),
        format="sharegpt" if sharegpt else "alpaca",
        columns=named | settings.columns,
        roles={tags.get(tag, usual): role for tag, (usual, role) in _ROLES.items()} | settings.roles,
    )


def _path(info: Path, entry: dict[str, Any], name: str | None, field: str) -> str:
    if entry.get("file_name"):
        path = info.parent / entry["file_name"]
        if not path.exists():
            raise FieldError(field, f"{info}: {name} names {path}, which is not there")
        return str(path)
    if entry.get("hf_hub_url"):
        return str(entry["hf_hub_url"])
    raise FieldError(field, f"{info}: {name} has neither `file_name` nor `hf_hub_url`")
