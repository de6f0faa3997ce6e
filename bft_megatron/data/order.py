"""The order of rows in a run: a function from place to row, without state that a checkpoint would have to hold."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np

from bft_megatron.data.packing import padded


class Order(Protocol):
    """A function from a place in the run to the row that stands there."""

    def row(self, place: int) -> int | None:
        """Return the row's number, or None for a row without samples."""


@dataclass(frozen=True)
class Shuffled:
    """Epochs one after another, each with its own permutation of the rows, up to `limit` places in total.

    rows: number of rows of each source; rows are numbered through the sources.
    taken: number of rows that an epoch takes from each source. If that is only a part of the source, the next epoch
        continues where the last one stopped, so every row comes once before any comes again; each pass through the
        source has its own permutation.
    """

    rows: tuple[int, ...]
    taken: tuple[int, ...]
    seed: int
    limit: int

    def row(self, place: int) -> int | None:
        """See `Order`."""
        if place >= self.limit:
            return None
        epoch, within = divmod(place, int(self._edges[-1]))
        drawn = int(_permutation(int(self._edges[-1]), (self.seed, epoch))[within])
        source = int(np.searchsorted(self._edges, drawn, side="right")) - 1
        size = self.rows[source]
        turn, at = divmod(epoch * self.taken[source] + drawn - int(self._edges[source]), size)
        if self.taken[source] % size:
            at = int(_permutation(size, (self.seed, turn, source + 1))[at])
        return sum(self.rows[:source]) + at

    @cached_property
    def _edges(self) -> np.ndarray:
        return np.cumsum([0, *self.taken])


@dataclass(frozen=True)
class Repeated:
    """All rows in order, filled up to a multiple of `batch` and repeated: each pass is a whole number of batches."""

    rows: int
    batch: int

    @property
    def places(self) -> int:
        """The number of places in one pass."""
        return padded(self.rows, self.batch)

    def row(self, place: int) -> int | None:
        """See `Order`."""
        within = place % self.places
        return within if within < self.rows else None


@lru_cache(maxsize=32)  # an epoch needs its own permutation, and two for each source that is taken in part
def _permutation(rows: int, seed: tuple[int, ...]) -> np.ndarray:
    """Return a permutation by sorting raw random numbers, which numpy keeps the same over releases, unlike shuffles."""
    keys = np.random.PCG64(seed).random_raw(rows)
    return np.argsort(keys, kind="stable").astype(np.int32)
