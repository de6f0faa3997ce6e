"""The data set that Megatron's data loader reads: rows as tensors, in the run's order. The only module here with torch.

The data set is map-style and much longer than any run. Step k takes the places [k * global batch, (k + 1) * global
batch) in every parallel layout, so resuming, changing the number of ranks and crossing an epoch need no state. An
`Order` (`order`) gives the row at each place; places past the end hold rows without samples, which add nothing to the
loss or its count.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset as Table

from bft_megatron.data.blend import Blend
from bft_megatron.data.columns import Columns
from bft_megatron.data.order import Order, Repeated, Shuffled
from bft_megatron.data.packing import padded
from bft_megatron.data.prepare import Prepared
from bft_megatron.labels import IGNORE_INDEX

VIRTUAL_LENGTH = 1 << 40
PADDING = 0
"""Token id at places without a sample. They are masked; 0 is used because every vocabulary has it, while not every
model has a padding token."""


class RowCounts(NamedTuple):
    """The counts of some rows."""

    samples: int = 0
    supervised: int = 0
    """Supervised labels."""
    tokens: int = 0
    """Input tokens without padding."""

    def __add__(self, other: RowCounts) -> RowCounts:  # type: ignore[override]
        return RowCounts(*(a + b for a, b in zip(self, other, strict=True)))


class RowDataset(torch.utils.data.Dataset):
    """The rows of prepared sources, in a given order. An item is the `Columns` of one row, a dict of CPU tensors."""

    def __init__(self, blend: Blend | Prepared, order: Order, length: int = VIRTUAL_LENGTH) -> None:
        self.blend, self.order, self.length = Blend.of(blend), order, length
        self._tables = [_tables(part.prepared.folder) for part in self.blend.parts]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        row = self.order.row(place)
        source, within = (0, None) if row is None else self.blend.find(row)
        samples = [] if within is None else self._read(source, within)
        return _row(samples, self.blend, -1 if row is None else row, source).item()

    def origins(self, row: int) -> list[tuple[int, int, int]]:
        """Return (source, file, line) of each sample of a row; a file is given by its index in its source."""
        source, within = self.blend.find(row)
        samples, rows = self._tables[source]
        columns = samples.select_columns(["file", "line"])[rows[within]["samples"]]
        return [(source, int(file), int(line)) for file, line in zip(columns["file"], columns["line"], strict=True)]

    def counts(self, rows: Sequence[int]) -> RowCounts:
        """Return what some rows hold together, given by their numbers; reads no tokens."""
        where, found = [self.blend.find(row) for row in rows], RowCounts()
        for source, (samples, table) in enumerate(self._tables):
            if within := [row for of, row in where if of == source]:
                held = np.concatenate(list(table.select_columns(["samples"])[within]["samples"]))
                for supervised in samples.select_columns(["learned"])[held]["learned"]:
                    found += RowCounts(1, int(supervised[1:].sum()), len(supervised) - 1)
        return found

    def _read(self, source: int, row: int) -> list[_Sample]:
        samples, rows = self._tables[source]
        columns = samples[rows[row]["samples"]]
        return list(zip(columns["tokens"], columns["learned"], columns["weight"], strict=True))


def _tables(folder: Path) -> tuple[Table, Table]:
    samples, rows = (
        Table.from_file(str(folder / f"{name}.arrow")).with_format("numpy") for name in ("samples", "rows")
    )
    return samples, rows


def training_rows(blend: Blend | Prepared, *, seed: int, limit: int) -> RowDataset:
    """Return a run's training data: `limit` rows, blended and shuffled anew each epoch; the same for the same seed."""
    return RowDataset(blend, training_order(blend, seed=seed, limit=limit))


def training_order(blend: Blend | Prepared, *, seed: int, limit: int) -> Shuffled:
    """Return the order of a run's training rows."""
    blend = Blend.of(blend)
    return Shuffled(blend.sizes, tuple(part.taken for part in blend.parts), seed, limit)


def validation_rows(blend: Blend | Prepared, *, batch: int) -> RowDataset:
    """Return all rows in order, repeated endlessly, each pass filled up to a multiple of `batch` rows."""
    return RowDataset(blend, Repeated(sum(Blend.of(blend).sizes), batch))


_Sample = tuple[np.ndarray, np.ndarray, float]  # tokens [n + 1] int32, supervised [n + 1] bool, weight


def full_row(seq_length: int, *, packing: bool) -> Columns:
    """Return a row that a single sample fills, all of it supervised: the row with the largest memory and time."""
    zeros, size = torch.zeros(seq_length, dtype=torch.int64), torch.tensor(seq_length)
    return Columns(
        tokens=zeros,
        labels=zeros,
        position_ids=torch.arange(seq_length),
        samples=torch.tensor(1),
        weight=torch.ones(1),
        padding=zeros.bool(),
        real_tokens=size,
        row=torch.tensor(0),
        source=torch.tensor(0),
        cu_seqlens=torch.tensor([0, seq_length], dtype=torch.int32) if packing else None,
        max_seqlen=size if packing else None,
    )


def _row(samples: list[_Sample], shape: Blend, number: int, source: int) -> Columns:
    """Return the columns of a row; an unpacked row's only sample fills it."""
    size = shape.seq_length
    edges = _edges([len(tokens) - 1 for tokens, _, _ in samples], shape)
    tokens, labels, padding = np.full(size, PADDING), np.full(size, IGNORE_INDEX), np.ones(size, np.bool_)
    weight = np.zeros(len(edges) - 1, np.float32)
    for k, (text, supervised, sample_weight) in enumerate(samples):
        place = slice(edges[k], edges[k] + len(text) - 1)
        tokens[place] = text[:-1]
        labels[place] = np.where(supervised[1:], text[1:], IGNORE_INDEX)
        padding[place] = False
        weight[k] = sample_weight
    lengths = np.diff(edges)
    positions = np.arange(size) - np.repeat(edges[:-1], lengths)
    real = sum(len(text) - 1 for text, _, _ in samples)
    return Columns(
        tokens=torch.as_tensor(tokens),
        labels=torch.as_tensor(labels),
        position_ids=torch.as_tensor(positions),
        samples=torch.tensor(len(samples)),
        weight=torch.as_tensor(weight),
        padding=torch.as_tensor(padding),
        real_tokens=torch.tensor(real),
        row=torch.tensor(number),
        source=torch.tensor(source),
        cu_seqlens=torch.as_tensor(edges.astype(np.int32)) if shape.packing else None,
        max_seqlen=torch.as_tensor(lengths.max()) if shape.packing else None,
    )


def _edges(lengths: list[int], shape: Blend) -> np.ndarray:
    """Return the edges of a row's segments, [k + 1] int64; packed, all but the end are multiples of `pad_multiple`."""
    if shape.packing:
        sizes = [padded(length, shape.pad_multiple) for length in lengths]
    else:
        sizes = [shape.seq_length] * len(lengths)
    left = shape.seq_length - sum(sizes)
    return np.cumsum([0, *sizes, left] if left else [0, *sizes])
