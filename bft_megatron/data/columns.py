"""The columns of a row, and of a micro-batch of rows: what the data set gives and the step takes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """A row, or b rows one behind the other: a row's tensors are those below without their first dimension.

    A row is cut into k segments: its samples, each with its padding, then what is left, if anything. A padded row is
    one segment, a row past the end of the data one without a sample, a filler.
    """

    tokens: Tensor
    """[b, s] int64"""
    labels: Tensor
    """[b, s] int64, the next token, IGNORE_INDEX where nothing is supervised"""
    position_ids: Tensor
    """[b, s] int64, from 0 in each segment"""
    samples: Tensor
    """[b] int64, how many samples a row holds; 0 for a filler"""
    weight: Tensor
    """[b, k] fp32, the data's weight of each sample; 0 for a segment that is none"""
    real_tokens: Tensor
    """[b] int64, places that hold a sample's tokens and no padding"""
    row: Tensor
    """[b] int64, the row's number, counted through the sources; -1 for a filler"""
    source: Tensor
    """[b] int64, which source the row is from; any for a filler"""
    cu_seqlens: Tensor | None = None
    """[1, k + 1] int32, the segments' edges, which cover a packed row; None: padded rows"""
    max_seqlen: Tensor | None = None
    """[1] int64, the longest segment of a packed row; the row's length only where one fills it, which rotary embedding
    needs
    """

    def item(self) -> dict[str, Tensor]:
        """The columns that there are, by name: what a data loader can stack."""
        values = ((field.name, getattr(self, field.name)) for field in fields(Columns))
        return {name: value for name, value in values if value is not None}
