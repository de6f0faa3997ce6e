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

    def part(self, key: str, also: tuple[str, ...]) -> ConfigFile:
        """Return the configuration of a part of a model, which has some values of the whole model as well.

        Args:
            also: keys whose values are the whole model's, if it has them.
        """
        part = self.get(key, None)
        if not isinstance(part, dict):
            raise UserError("must be the configuration of a part of the model", f"{self.path}: {key}")
        return ConfigFile(self.path, part | {name: self.values[name] for name in also if name in self.values})

    def get(self, key: str, default: Any) -> Any:
        """Return the value of `key`, or the default if it is missing or null, as in transformers."""
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.get(key, default)
        if type(value) is not int or not least <= value <= INT32:
            what = "a positive whole number" if least == 1 else f"a whole number from {least}"
            raise UserError(f"must be {what}, not {shortened(repr(value))}", f"{self.path}: {key}")
        return value

    def any_of(self, *keys: str) -> int:
        """Return a number that releases of transformers write under different keys.

        Raises:
            UserError: it is under none of them, or two disagree.
        """
        there = [key for key in keys if self.get(key, None) is not None]
        if len({self.same_in_all_layers(key) for key in there}) > 1:
            raise UserError(f"is not {there[1]}, which is another name of it", f"{self.path}: {there[0]}")
        return self.same_in_all_layers(there[0] if there else keys[0])

    def same_in_all_layers(self, key: str, default: int | None = None) -> int:
        """Return a number that a file may have as a list with an entry for each layer."""
        value = self.get(key, default)
        if not isinstance(value, list):
            return self.integer(key, default)
        if len(value) != self.integer("num_hidden_layers") or any(x != value[0] for x in value):
            raise self.unsupported("layers that differ in it", key)
        return ConfigFile(self.path, {key: value[0]}).integer(key)

    def number(self, key: str, default: float, group: dict[str, Any] | None = None) -> float:
        """Return a finite number that is not negative, from a group of values if it has one."""
        value = (group or {}).get(key, self.get(key, default))
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise UserError(f"must be a finite number, not {shortened(repr(value))}", f"{self.path}: {key}")
        return float(value)

    def unsupported(self, what: str, key: str) -> UserError:
        return UserError(f"not supported: {what}", f"{self.path}: {key}")
