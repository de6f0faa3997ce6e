"""Which row stands at which place of a run: a function of the place alone, so that there is no state to lose."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np

from bft_megatron.data.packing import padded


class Order(Protocol):
    """Which row stands at a place."""

    def row(self, place: int) -> int | None:
        """The row's number, or None for a row without samples."""


@dataclass(frozen=True)
class Shuffled:
    """Epoch after epoch, each in a permutation of its own, up to `limit` places in all.

    rows: of each source. Their numbers run on from one source to the next.
    taken: how many rows an epoch takes of each source. Of one that is taken in part, epochs go on where the last one
        stopped, so that no row comes again before all have come once; each pass through it has an order of its own.
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
    """All rows in order, filled up to a multiple of `batch`, again and again: every `batch`-wise pass is whole."""

    rows: int
    batch: int

    @property
    def places(self) -> int:
        """Places of one pass."""
        return padded(self.rows, self.batch)

    def row(self, place: int) -> int | None:
        """See `Order`."""
        within = place % self.places
        return within if within < self.rows else None


@lru_cache(maxsize=32)  # an epoch needs its own, and two of each source that is taken in part
def _permutation(rows: int, seed: tuple[int, ...]) -> np.ndarray:
    """By sorting raw random numbers: numpy keeps those the same in every release, but not its shuffles."""
    keys = np.random.PCG64(seed).random_raw(rows)
    return np.argsort(keys, kind="stable").astype(np.int32)
