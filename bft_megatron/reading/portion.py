"""Taking a slice of a source's rows over all its chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from bft_megatron.reading.readers import Chunk


def portion(chunks: Iterator[Chunk], first: int, end: int | None) -> Iterator[Chunk]:
    """Yield the rows [first, end), counted from 0 over all chunks without blank lines."""
    at = 0
    for chunk in chunks:
        if end is not None and at >= end:
            return
        wanted = slice(max(0, first - at), None if end is None else end - at)
        if isinstance(chunk.rows, list):
            filled: Sequence[int] = [i for i, row in enumerate(chunk.rows) if not isinstance(row, bytes) or row.strip()]
            kept = filled[wanted]
            rows = [chunk.rows[i] for i in kept]
        else:
            filled = range(len(chunk.rows))
            kept = filled[wanted]
            rows = chunk.rows.slice(wanted.start, len(kept))
        at += len(filled)
        if kept:
            yield replace(chunk, numbers=[chunk.numbers[i] for i in kept], rows=rows)
