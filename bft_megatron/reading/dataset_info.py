"""Reading LLaMA-Factory's dataset_info.json: an entry becomes the settings of a source."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bft_megatron.errors import FieldError, reading, shortened
from bft_megatron.recipe.sources import SourceSettings
from bft_megatron.textfiles import read_object

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
    "ranking": "holds preferences, not answers: to learn the chosen ones, make its file the source, with `columns`",
    "num_samples": "draws samples: write them to a file of their own, or set the source's `weight`",
    "kto_tag": "holds good and bad answers: make its file the source, with `data.on_error: skip` for the bad ones",
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
    entries = read_object(path, field)
    if not isinstance(values := entries.get(settings.name or ""), dict):
        names = shortened(", ".join(entries) or "none", 200)
        raise FieldError(field, f"{path} has no data set {settings.name}; set the source's `name` to one of {names}")
    entry = _Entry(values, f"{path}: {settings.name}", field)
    columns, tags = entry.names("columns"), entry.names("tags")
    for key, reason in _REFUSED.items():
        if values.get(key) or columns.get(key):
            raise FieldError(field, f"{entry.place} {reason} (`{key}`)")
    sharegpt = entry.text("formatting") in ("sharegpt", "openai")  # they differ in their tags only
    named = {key: value for key, value in columns.items() if key in _COLUMNS}
    if sharegpt:
        named |= {key: tags[f"{key}_tag"] for key in ("role", "content") if f"{key}_tag" in tags}
    return replace(
        settings,
        path=_path(path, entry),
        subset=settings.subset or entry.text("subset"),
        split=entry.text("split") or settings.split,
        format="sharegpt" if sharegpt else "alpaca",
        columns=named | settings.columns,
        roles={tags.get(tag, usual): role for tag, (usual, role) in _ROLES.items()} | settings.roles,
    )


@dataclass(frozen=True)
class _Entry:
    """An entry's values. Errors name the recipe's field, the file, the entry and the key."""

    values: dict[str, Any]
    place: str
    field: str

    def text(self, key: str) -> str | None:
        """Return text; None if there is none."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, f"must be text, not {_shown(value)}")
        return value or None

    def names(self, key: str) -> dict[str, str]:
        """Return an object of texts, without its empty and null values."""
        value = self.values.get(key) or {}
        if not isinstance(value, dict) or not all(isinstance(name, str | None) for name in value.values()):
            raise self.wrong(key, f'must be an object of names, such as {{"prompt": "question"}}, not {_shown(value)}')
        return {name: text for name, text in value.items() if text}

    def wrong(self, key: str, message: str) -> FieldError:
        return FieldError(self.field, f"{self.place}: `{key}` {message}")


def _path(info: Path, entry: _Entry) -> str:
    if name := entry.text("file_name"):
        path = info.parent / name
        with reading(f"{entry.place}: `file_name`", entry.field):
            if not path.exists():
                raise FieldError(entry.field, f"{entry.place} names {path}, which is not there")
        return str(path)
    if name := entry.text("hf_hub_url"):
        return name
    raise FieldError(entry.field, f"{entry.place} has neither `file_name` nor `hf_hub_url`")


def _shown(value: Any) -> str:
    return shortened(json.dumps(value))
