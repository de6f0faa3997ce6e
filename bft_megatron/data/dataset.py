"""Rows as tensors, in the order of the run: what Megatron's data loader reads. The one module here with torch.

The data set is map-style and of a length far beyond any run: step k takes the places [k * global batch, (k + 1) *
global batch) on every layout, so resuming, changing the number of ranks and the edge of an epoch need no state. Which
row stands at a place is an `Order`; places past the end hold rows without samples, which count nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from datasets import Dataset as Table

from bft_megatron.data.packing import padded
from bft_megatron.data.prepare import Prepared

VIRTUAL_LENGTH = 1 << 40
IGNORED = -100
PADDING = 0
"""Stands where no sample is. Masked, so any token would do that every model has: not each one's padding token is."""


class Order(Protocol):
    """Which row stands at a place."""

    def row(self, place: int) -> int | None:
        """The row's number, or None for a row without samples."""


@dataclass(frozen=True)
class Shuffled:
    """Epoch after epoch, each in a permutation of its own, up to `limit` places in all."""

    rows: int
    seed: int
    limit: int

    def row(self, place: int) -> int | None:
        """See `Order`."""
        if place >= self.limit:
            return None
        epoch, within = divmod(place, self.rows)
        return int(_permutation(self.rows, self.seed, epoch)[within])


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


class RowDataset(torch.utils.data.Dataset):
    """The rows of a prepared source, in an order.

    A row is cut into k segments: its samples, each with its padding, then what is left, if anything. A padded row is
    one segment, a row past the end one without a sample. An item is a dict of CPU tensors, int64 unless it says fp32
    or int32:

        tokens [s]        s is `prepared.seq_length`
        labels [s]        the sample's next token where that is learned, else -100
        position_ids [s]  from 0 in each segment
        weight [k]        fp32, the data's weight of each sample; 0 for a segment that is none
        samples []        how many the row holds; 0 past the end
        real_tokens []    places that hold a sample's tokens
        row []            the row's number; -1 past the end

    and if packed:

        cu_seqlens [k + 1]  int32, edges of the segments, which cover the row
        max_seqlen []       the longest segment; the row's length only where one fills it, which rotary embedding needs
    """

    def __init__(self, prepared: Prepared, order: Order, length: int = VIRTUAL_LENGTH) -> None:
        self.prepared, self.order, self.length = prepared, order, length
        self._samples = Table.from_file(str(prepared.folder / "samples.arrow")).with_format("numpy")
        self._rows = Table.from_file(str(prepared.folder / "rows.arrow")).with_format("numpy")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        row = self.order.row(place)
        samples = [] if row is None else self._read(row)
        item = _row(samples, self.prepared)
        return item | {"samples": torch.tensor(len(samples)), "row": torch.tensor(-1 if row is None else row)}

    def _read(self, row: int) -> list[_Sample]:
        columns = self._samples[self._rows[row]["samples"]]
        return list(zip(columns["tokens"], columns["learned"], columns["weight"], strict=True))


def training_rows(prepared: Prepared, *, seed: int, limit: int) -> RowDataset:
    """The rows of a run: `limit` of them, shuffled anew in each epoch, the same for the same seed."""
    return RowDataset(prepared, Shuffled(prepared.rows, seed, limit))


def validation_rows(prepared: Prepared, *, batch: int) -> RowDataset:
    """All rows in order, again and again, each pass filled up to a multiple of `batch` rows."""
    return RowDataset(prepared, Repeated(prepared.rows, batch))


_Sample = tuple[np.ndarray, np.ndarray, float]  # tokens [n + 1] int32, learned [n + 1] bool, weight


@lru_cache(maxsize=2)
def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    """By sorting raw random numbers: numpy keeps those the same in every release, but not its shuffles."""
    keys = np.random.PCG64([seed, epoch]).random_raw(rows)
    return np.argsort(keys, kind="stable")


def _row(samples: list[_Sample], prepared: Prepared) -> dict[str, torch.Tensor]:
    """The tensors of a row but for its numbers; a padded row is one whose only sample takes all of it."""
    size = prepared.seq_length
    edges = _edges([len(tokens) - 1 for tokens, _, _ in samples], prepared)
    tokens, labels = np.full(size, PADDING), np.full(size, IGNORED)
    weight = np.zeros(len(edges) - 1, np.float32)
    for k, (text, learned, sample_weight) in enumerate(samples):
        place = slice(edges[k], edges[k] + len(text) - 1)
        tokens[place] = text[:-1]
        labels[place] = np.where(learned[1:], text[1:], IGNORED)
        weight[k] = sample_weight
    lengths = np.diff(edges)
    positions = np.arange(size) - np.repeat(edges[:-1], lengths)
    real = sum(len(text) - 1 for text, _, _ in samples)
    row = {"tokens": tokens, "labels": labels, "position_ids": positions, "weight": weight, "real_tokens": real}
    if prepared.packing:
        row |= {"cu_seqlens": edges.astype(np.int32), "max_seqlen": lengths.max()}
    return {name: torch.as_tensor(value) for name, value in row.items()}


def _edges(lengths: list[int], prepared: Prepared) -> np.ndarray:
    """Where the segments of a row begin, and its end: [k + 1] int64; packed, all are multiples of `pad_multiple`."""
    if prepared.packing:
        sizes = [padded(length, prepared.pad_multiple) for length in lengths]
    else:
        sizes = [prepared.seq_length] * len(lengths)
    left = prepared.seq_length - sum(sizes)
    return np.cumsum([0, *sizes, left] if left else [0, *sizes])
