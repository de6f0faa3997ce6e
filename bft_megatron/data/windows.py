"""Counting, before a run, the samples in which context parallelism leaves no confidence window.

The rule is that of `objective.view`: a window is a number of consecutive supervised tokens that does not cross the edge
of one of the equal chunks of a sample's padded length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from bft_megatron.data.blend import Blend
from bft_megatron.data.prepare import Prepared


@dataclass(frozen=True)
class Windows:
    """Numbers of samples.

    short: samples with fewer supervised tokens than a window.
    lost: samples with enough of them in all, and in no chunk.
    """

    short: int
    lost: int


def count(blend: Blend, group_size: int, chunks: int) -> Windows:
    """Count over all sources, each once whatever its weight; reads a bit for each token.

    Args:
        blend: the prepared rows.
        group_size: supervised tokens of a window.
        chunks: chunks of a sample, 1 without context parallelism.
    """
    short = lost = 0
    for part in blend.parts:
        for totals, fullest in _most(part.prepared, chunks):
            short += int((totals < group_size).sum())
            lost += int(((totals >= group_size) & (fullest < group_size)).sum())
    return Windows(short, lost)


def _most(prepared: Prepared, chunks: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return, by batches, each sample's supervised tokens and those of its fullest chunk, both [samples] int64."""
    found = []
    with pa.memory_map(str(prepared.folder / "samples.arrow")) as file, pa.ipc.open_stream(file) as stream:
        for batch in stream:
            learned = batch.column("learned")
            starts = learned.offsets.to_numpy().astype(np.int64) - learned.offsets[0].as_py()
            found.append(_of_batch(learned.flatten().to_numpy(zero_copy_only=False), starts, prepared, chunks))
    return found


def _of_batch(learned: np.ndarray, starts: np.ndarray, shape: Prepared, chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what `_most` does for a batch: learned is flat [tokens] bool, starts are the samples' edges in it."""
    before = np.concatenate([[0], np.cumsum(learned, dtype=np.int64)])  # supervised tokens before each place
    first, lengths = starts[:-1] + 1, np.diff(starts) - 1  # a sample's first token is no label
    multiple = shape.pad_multiple
    sizes = -(-lengths // multiple) * multiple if shape.packing else np.full_like(lengths, shape.seq_length)
    edges = [first + np.minimum(sizes // chunks * k, lengths) for k in range(chunks)] + [first + lengths]
    within = np.diff([before[edge] for edge in edges], axis=0)  # [chunks, samples]
    return within.sum(0), within.max(0)
