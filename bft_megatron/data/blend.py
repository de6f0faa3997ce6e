"""A blend: several prepared sources that a run trains on together, each with a weight."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bft_megatron.data.counts import Counts
from bft_megatron.data.prepare import Prepared


@dataclass(frozen=True)
class Part:
    """A prepared source of a blend.

    Attributes:
        name: the source's name in reports.
        prepared: its rows. A row holds samples of one source only, so adding a source leaves the others' rows as they
            are.
        weight: how many times an epoch goes through the source; may be a fraction.
    """

    name: str
    prepared: Prepared
    weight: float = 1.0

    @property
    def taken(self) -> int:
        """The number of rows that an epoch takes from this source."""
        return max(1, round(self.weight * self.prepared.rows))


@dataclass(frozen=True)
class Blend:
    """Prepared sources with the same row length and packing."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, blend: Blend | Prepared) -> Blend:
        """Return `blend` itself, or wrap a single source as a blend of one part."""
        return blend if isinstance(blend, Blend) else cls((Part("", blend),))

    @property
    def rows(self) -> int:
        """The number of rows in one epoch."""
        return sum(part.taken for part in self.parts)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of rows in each source."""
        return tuple(part.prepared.rows for part in self.parts)

    @property
    def names(self) -> tuple[str, ...]:
        """The sources' names in reports."""
        return tuple(part.name for part in self.parts)

    @property
    def seq_length(self) -> int:
        """The number of tokens in a row."""
        return self.parts[0].prepared.seq_length

    @property
    def packing(self) -> bool:
        """Whether a row holds more than one sample."""
        return self.parts[0].prepared.packing

    @property
    def pad_multiple(self) -> int:
        """The multiple that the length of a packed sample is padded to."""
        return self.parts[0].prepared.pad_multiple

    @cached_property
    def counts(self) -> Counts:
        """The counts added over all sources, each counted once whatever its weight."""
        counts = Counts()
        for part in self.parts:
            counts.add(part.prepared.counts)
        return counts

    @property
    def tokens(self) -> float:
        """The number of tokens in one epoch, without padding."""
        return sum(part.taken * part.prepared.counts.tokens / part.prepared.rows for part in self.parts)

    def find(self, row: int) -> tuple[int, int]:
        """Return the source of a row and the row's number within it; `row` is numbered through all sources."""
        source = int(np.searchsorted(self._edges, row, side="right")) - 1
        return source, row - int(self._edges[source])

    @cached_property
    def _edges(self) -> np.ndarray:
        return np.cumsum([0, *self.sizes])
