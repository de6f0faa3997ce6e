"""Reading a LLaMA-Factory config, YAML or JSON: typed access to its fields; every error names file and line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bft_megatron.errors import UserError
from bft_megatron.recipe.yaml_file import YamlFile
from bft_megatron.textfiles import read_text


class Config:
    """The fields of a config.

    Attributes:
        path: the file.

    Raises:
        UserError: the file cannot be read, or is not a mapping of fields.
    """

    def __init__(self, path: Path) -> None:
        text = read_text(path)
        self._file = YamlFile(path, text.expandtabs() if path.suffix == ".json" else text)  # JSON is YAML except tabs
        self.path = path
        values = OmegaConf.to_container(self._file.tree)
        assert isinstance(values, dict), "YamlFile refuses whatever is no mapping"
        self._values = {str(name): value for name, value in values.items()}

    @property
    def names(self) -> list[str]:
        """The fields that have a value, in the file's order."""
        return [name for name, value in self._values.items() if value is not None]

    def given(self, name: str) -> bool:
        """Return whether the file sets a field to a value."""
        return self._values.get(name) is not None

    def raw(self, name: str) -> Any:
        """Return a field's value as it stands, or None."""
        return self._values.get(name)

    def number(self, name: str, default: float, least: float = 0.0) -> float:
        """Return a finite number not below `least`. Raises UserError if it isn't one."""
        value = self.raw(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(name, f"must be a number, not {value!r}")
        if value < least:
            raise self.wrong(name, f"must not be below {least:g}, as {value} is")
        return value

    def integer(self, name: str, default: int, least: int = 1) -> int:
        """Return a whole number not below `least`. Raises UserError if it isn't one."""
        value = self.number(name, default, least)
        if value != int(value):
            raise self.wrong(name, f"must be a whole number, not {value}")
        return int(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """Return true or false. Raises UserError if it is neither."""
        value = self.raw(name)
        if not isinstance(value, bool | None):
            raise self.wrong(name, f"must be true or false, not {value!r}")
        return default if value is None else value

    def text(self, name: str, default: str = "") -> str:
        """Return text. Raises UserError if it isn't text."""
        value = self.raw(name)
        if not isinstance(value, str | None):
            raise self.wrong(name, f"must be text, not {value!r}")
        return default if value is None else value

    def texts(self, name: str) -> list[str]:
        """Return a list of names, given as a list or separated by commas; [] if the field has no value.

        Raises:
            UserError: the value is neither.
        """
        value = self.raw(name)
        items = value.split(",") if isinstance(value, str) else value or []
        if not isinstance(items, list) or not all(isinstance(item, str) and item.strip() for item in items):
            raise self.wrong(name, f"must be names with commas between them, not {value!r}")
        return [item.strip() for item in items]

    def where(self, name: str) -> str:
        """Return "file:line: field"."""
        return self._file.where(name)

    def wrong(self, name: str, message: str) -> UserError:
        """Return an error about a field."""
        return UserError(message, self.where(name))
