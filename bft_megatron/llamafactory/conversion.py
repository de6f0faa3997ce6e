"""What becomes of a config: fields of the recipe, rows of the table, and the fields that were not carried over."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from bft_megatron.llamafactory.config import Config
from bft_megatron.recipe.schema import (
    DataSettings,
    LoraSettings,
    ObjectiveSettings,
    ParallelSettings,
    Recipe,
    TrainSettings,
)

GROUPS = {
    "objective": ObjectiveSettings,
    "data": DataSettings,
    "parallel": ParallelSettings,
    "lora": LoraSettings,
    "train": TrainSettings,
}
"""The recipe's groups of fields."""


@dataclass(frozen=True)
class Row:
    """A line of the table: one matter, as LLaMA-Factory has it and as the recipe has it."""

    matter: str
    theirs: str
    ours: str


@dataclass(frozen=True)
class Lost:
    """A field that was not carried over, with the place in the file, and why."""

    where: str
    name: str
    value: Any
    why: str


@dataclass
class Conversion:
    """A config on its way to a recipe.

    Attributes:
        config: what is converted.
        gpus: on how many it runs.
        assumed: whether nobody said so.
        samples: conversations of an epoch; None where the data are not here to be counted.
        fields: the recipe's, by dotted name.
        rows: of the table.
        lost: what was not carried over.
        not_needed: reason -> fields that need no counterpart.
    """

    config: Config
    gpus: int
    assumed: bool = False
    samples: int | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)
    not_needed: dict[str, list[str]] = field(default_factory=dict)

    def carry(self, matter: str, theirs: str, name: str, value: Any, ours: str = "") -> None:
        """Set a field of the recipe and say so in the table.

        Args:
            matter: what it is about.
            theirs: LLaMA-Factory's fields and values.
            name: the recipe's field, dotted.
            ours: for the table, in place of the field and its value.
        """
        self.fields[name] = value
        self.show(matter, theirs, ours or f"{name} {_shown(value)}")

    def show(self, matter: str, theirs: str, ours: str) -> None:
        """Say in the table what holds in the recipe without a field of it being set."""
        self.rows.append(Row(matter, theirs, ours))

    def carry_field(self, matter: str, theirs: str, name: str, value: Any) -> None:
        """`carry` for LLaMA-Factory's field `theirs`; the recipe leaves out its own default, unless it was given."""
        if self.config.given(theirs) or value != _default(name):
            self.fields[name] = value
        self.show(matter, f"{theirs} {_shown(value)}", f"{name} {_shown(value)}")

    def lose(self, name: str, why: str) -> None:
        """Name a field that is not carried over."""
        self.lost.append(Lost(self.config.where(name), name, self.config.raw(name), why))


def _default(name: str) -> Any:
    group, _, leaf = name.rpartition(".")
    declared = next(f for f in fields(GROUPS.get(group, Recipe)) if f.name == leaf)
    return None if declared.default is MISSING else declared.default


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
