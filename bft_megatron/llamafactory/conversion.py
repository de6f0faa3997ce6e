"""The result of a conversion: the recipe's fields, the rows of the table, and the fields that were not carried over."""

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
"""The recipe's groups of fields and their dataclasses."""


@dataclass(frozen=True)
class Row:
    """A row of the table: one topic, in LLaMA-Factory and in the recipe."""

    matter: str
    theirs: str
    ours: str


@dataclass(frozen=True)
class Lost:
    """A field that was not carried over, its place in the file, and the reason."""

    where: str
    name: str
    value: Any
    why: str


@dataclass
class Conversion:
    """A config and the recipe it is being converted to.

    Attributes:
        config: the config.
        gpus: number of GPUs that the run uses.
        assumed: whether `gpus` is a default.
        samples: conversations in an epoch; None if the data are not here to be counted.
        fields: the recipe's fields by dotted name.
        rows: rows of the table.
        lost: fields that were not carried over.
        differing: field that is carried over, but does something else here -> what.
        not_needed: reason -> fields that need no counterpart.
    """

    config: Config
    gpus: int
    assumed: bool = False
    samples: int | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)
    differing: dict[str, str] = field(default_factory=dict)
    not_needed: dict[str, list[str]] = field(default_factory=dict)

    def carry(self, matter: str, theirs: str, name: str, value: Any, ours: str = "") -> None:
        """Set a field of the recipe and add a row to the table.

        Args:
            matter: the row's topic.
            theirs: LLaMA-Factory's fields and values.
            name: the recipe's field, dotted.
            ours: text for the table in place of the field and its value.
        """
        self.fields[name] = value
        self.show(matter, theirs, ours or f"{name} {_shown(value)}")

    def show(self, matter: str, theirs: str, ours: str) -> None:
        """Add a row to the table without setting a field of the recipe."""
        self.rows.append(Row(matter, theirs, ours))

    def carry_field(self, matter: str, theirs: str, name: str, value: Any) -> None:
        """Call `carry` for LLaMA-Factory's field `theirs`; the recipe omits a default that the config does not give."""

        if self.config.given(theirs) or value != _default(name):
            self.fields[name] = value
        self.show(matter, f"{theirs} {_shown(value)}", f"{name} {_shown(value)}")

    def differ(self, name: str, how: str) -> None:
        """Record a field that does something else here."""
        self.differing[name] = how

    def lose(self, name: str, why: str) -> None:
        """Record a field that is not carried over."""
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
