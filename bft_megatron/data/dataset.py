"""Rows as tensors, in the order of the run: what Megatron's data loader reads. The one module here with torch.

The data set is map-style and of a length far beyond any run: step k takes the places [k * global batch, (k + 1) *
global batch) on every layout, so resuming, changing the number of ranks and the edge of an epoch need no state. Which
row stands at a place is an `Order` (`order`); places past the end hold rows without samples, which count nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset as Table

from bft_megatron.data.blend import Blend
from bft_megatron.data.order import Order, Repeated, Shuffled
from bft_megatron.data.packing import padded
from bft_megatron.data.prepare import Prepared
from bft_megatron.labels import IGNORE_INDEX

VIRTUAL_LENGTH = 1 << 40
PADDING = 0
"""Stands where no sample is. Masked, so any token would do that every model has: not each one's padding token is."""


class RowDataset(torch.utils.data.Dataset):
    """The rows of prepared sources, in an order.

    A row is cut into k segments: its samples, each with its padding, then what is left, if anything. A padded row is
    one segment, a row past the end one without a sample. An item is a dict of CPU tensors, int64 unless it says fp32
    or int32:

        tokens [s]        s is `blend.seq_length`
        labels [s]        the sample's next token where that is learned, else IGNORE_INDEX
        position_ids [s]  from 0 in each segment
        weight [k]        fp32, the data's weight of each sample; 0 for a segment that is none
        samples []        how many the row holds; 0 past the end
        real_tokens []    places that hold a sample's tokens
        row []            the row's number, counted through the sources; -1 past the end
        source []         which source it is from; 0 past the end

    and if packed:

        cu_seqlens [k + 1]  int32, edges of the segments, which cover the row
        max_seqlen []       the longest segment; the row's length only where one fills it, which rotary embedding needs
    """

    def __init__(self, blend: Blend | Prepared, order: Order, length: int = VIRTUAL_LENGTH) -> None:
        self.blend, self.order, self.length = Blend.of(blend), order, length
        self._tables = [_tables(part.prepared.folder) for part in self.blend.parts]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        row = self.order.row(place)
        source, within = (0, None) if row is None else self.blend.find(row)
        samples = [] if within is None else self._read(source, within)
        item = _row(samples, self.blend)
        numbers = {"samples": len(samples), "row": -1 if row is None else row, "source": source}
        return item | {name: torch.tensor(number) for name, number in numbers.items()}

    def origins(self, row: int) -> list[tuple[int, int, int]]:
        """Source, file and line of each sample of a row, by the row's number; a file by its place in its source."""
        source, within = self.blend.find(row)
        samples, rows = self._tables[source]
        columns = samples.select_columns(["file", "line"])[rows[within]["samples"]]
        return [(source, int(file), int(line)) for file, line in zip(columns["file"], columns["line"], strict=True)]

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
    """The rows of a run: `limit` of them, blended and shuffled anew in each epoch, the same for the same seed."""
    return RowDataset(blend, training_order(blend, seed=seed, limit=limit))


def training_order(blend: Blend | Prepared, *, seed: int, limit: int) -> Shuffled:
    """Which row stands at which place of a run."""
    blend = Blend.of(blend)
    return Shuffled(blend.sizes, tuple(part.taken for part in blend.parts), seed, limit)


def validation_rows(blend: Blend | Prepared, *, batch: int) -> RowDataset:
    """All rows in order, again and again, each pass filled up to a multiple of `batch` rows."""
    return RowDataset(blend, Repeated(sum(Blend.of(blend).sizes), batch))


_Sample = tuple[np.ndarray, np.ndarray, float]  # tokens [n + 1] int32, learned [n + 1] bool, weight


def _row(samples: list[_Sample], shape: Blend) -> dict[str, torch.Tensor]:
    """The tensors of a row but for its numbers; a padded row is one whose only sample takes all of it."""
    size = shape.seq_length
    edges = _edges([len(tokens) - 1 for tokens, _, _ in samples], shape)
    tokens, labels = np.full(size, PADDING), np.full(size, IGNORE_INDEX)
    weight = np.zeros(len(edges) - 1, np.float32)
    for k, (text, learned, sample_weight) in enumerate(samples):
        place = slice(edges[k], edges[k] + len(text) - 1)
        tokens[place] = text[:-1]
        labels[place] = np.where(learned[1:], text[1:], IGNORE_INDEX)
        weight[k] = sample_weight
    lengths = np.diff(edges)
    positions = np.arange(size) - np.repeat(edges[:-1], lengths)
    real = sum(len(text) - 1 for text, _, _ in samples)
    row = {"tokens": tokens, "labels": labels, "position_ids": positions, "weight": weight, "real_tokens": real}
    if shape.packing:
        row |= {"cu_seqlens": edges.astype(np.int32), "max_seqlen": lengths.max()}
    return {name: torch.as_tensor(value) for name, value in row.items()}


def _edges(lengths: list[int], shape: Blend) -> np.ndarray:
    """Where the segments of a row begin, and its end: [k + 1] int64; packed, all are multiples of `pad_multiple`."""
    if shape.packing:
        sizes = [padded(length, shape.pad_multiple) for length in lengths]
    else:
        sizes = [shape.seq_length] * len(lengths)
    left = shape.seq_length - sum(sizes)
    return np.cumsum([0, *sizes, left] if left else [0, *sizes])
