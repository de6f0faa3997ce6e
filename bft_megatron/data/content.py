"""A hash of prepared rows: of what a run learns from them, whatever the files that hold it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow


class ContentHash:
    """A hash of samples and rows, added in the order in which they are written.

    It depends neither on how the samples are divided into batches nor on the bytes of an Arrow file, so that every
    release of pyarrow gives the same.
    """

    def __init__(self) -> None:
        self._streams = {name: hashlib.sha256() for name in ("lengths", "tokens", "learned", "weight", "sizes", "rows")}

    def add_samples(self, samples: pyarrow.Table) -> None:
        """Add samples: their `tokens`, `learned` and `weight` (see `encoding.Encoded`)."""
        for batch in samples.to_batches():
            tokens, learned = batch.column("tokens"), batch.column("learned")
            self._add("lengths", tokens.value_lengths(), "<i8")
            self._add("tokens", tokens.flatten(), "<i4")
            self._add("learned", learned.flatten(), "u1")
            self._add("weight", batch.column("weight"), "<f4")

    def add_rows(self, rows: Sequence[Sequence[int]]) -> None:
        """Add rows: the samples of each."""
        self._update("sizes", np.array([len(row) for row in rows], "<i8"))
        self._update("rows", np.array([sample for row in rows for sample in row], "<i8"))

    def hexdigest(self) -> str:
        """Return the SHA-256 of all that was added, as text."""
        return hashlib.sha256(b"".join(stream.digest() for stream in self._streams.values())).hexdigest()

    def _add(self, stream: str, column: Any, dtype: str) -> None:
        self._update(stream, column.to_numpy(zero_copy_only=False).astype(dtype, copy=False))

    def _update(self, stream: str, values: np.ndarray) -> None:
        self._streams[stream].update(np.ascontiguousarray(values).data)
