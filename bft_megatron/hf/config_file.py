"""Reading values of a model's `config.json`, with errors that name file and key."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bft_megatron.errors import UserError, shortened
from bft_megatron.recipe.limits import INT32
from bft_megatron.textfiles import read_object


@dataclass(frozen=True)
class ConfigFile:
    """A parsed `config.json`; its errors name file and key."""

    path: Path
    values: dict[str, Any]

    @classmethod
    def of(cls, folder: Path) -> ConfigFile:
        path = folder / "config.json"
        if not folder.is_dir():
            raise UserError("no such model folder", str(folder))
        return cls(path, read_object(path))

    def get(self, key: str, default: Any) -> Any:
        """Return the value of `key`, or the default if it is missing or null, as in transformers."""
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or not 1 <= value <= INT32:
            raise UserError(f"must be a positive whole number, not {shortened(repr(value))}", f"{self.path}: {key}")
        return value

    def number(self, key: str, default: float, group: dict[str, Any] | None = None) -> float:
        """Return a finite number that is not negative, from a group of values if it has one."""
        value = (group or {}).get(key, self.get(key, default))
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise UserError(f"must be a finite number, not {shortened(repr(value))}", f"{self.path}: {key}")
        return float(value)

    def unsupported(self, what: str, key: str) -> UserError:
        return UserError(f"not supported: {what}", f"{self.path}: {key}")
