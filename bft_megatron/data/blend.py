"""Prepared sources that a run learns from together, each as often as its weight says."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bft_megatron.data.encoding import Counts
from bft_megatron.data.prepare import Prepared


@dataclass(frozen=True)
class Part:
    """A prepared source of a blend.

    Attributes:
        name: in the reports.
        prepared: its rows. A row holds samples of one source, so that adding a source leaves the others as they are.
        weight: how often an epoch goes through it.
    """

    name: str
    prepared: Prepared
    weight: float = 1.0

    @property
    def taken(self) -> int:
        """Rows that an epoch takes of it."""
        return max(1, round(self.weight * self.prepared.rows))


@dataclass(frozen=True)
class Blend:
    """Sources whose rows have one shape."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, blend: Blend | Prepared) -> Blend:
        """A blend, or one of a single source."""
        return blend if isinstance(blend, Blend) else cls((Part("", blend),))

    @property
    def rows(self) -> int:
        """Rows of one epoch."""
        return sum(part.taken for part in self.parts)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each source."""
        return tuple(part.prepared.rows for part in self.parts)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sources, in the reports."""
        return tuple(part.name for part in self.parts)

    @property
    def seq_length(self) -> int:
        """Tokens of a row."""
        return self.parts[0].prepared.seq_length

    @property
    def packing(self) -> bool:
        """Whether a row holds many samples."""
        return self.parts[0].prepared.packing

    @property
    def pad_multiple(self) -> int:
        """What a packed sample is padded to a multiple of."""
        return self.parts[0].prepared.pad_multiple

    @cached_property
    def counts(self) -> Counts:
        """Of all sources, each once, whatever its weight."""
        counts = Counts()
        for part in self.parts:
            counts.add(part.prepared.counts)
        return counts

    @property
    def tokens(self) -> float:
        """Tokens of one epoch, padding not among them."""
        return sum(part.taken * part.prepared.counts.tokens / part.prepared.rows for part in self.parts)

    def find(self, row: int) -> tuple[int, int]:
        """A row's number, counted through the sources -> its source, its number there."""
        source = int(np.searchsorted(self._edges, row, side="right")) - 1
        return source, row - int(self._edges[source])

    @cached_property
    def _edges(self) -> np.ndarray:
        return np.cumsum([0, *self.sizes])
