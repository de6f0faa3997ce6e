"""The columns of a row and of a micro-batch of rows, which the data set returns and the training step reads."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """The tensors of b rows in sequence. The tensors of a single row lack the first dimension of the shapes below.

    A row consists of k segments: its samples, each with its padding, then the unused rest of the row, if any. A padded
    row is one segment. A filler, a row past the end of the data, is one segment without a sample.
    """

    tokens: Tensor
    """[b, s] int64"""
    labels: Tensor
    """[b, s] int64, the next token, IGNORE_INDEX where nothing is supervised"""
    position_ids: Tensor
    """[b, s] int64, from 0 in each segment"""
    samples: Tensor
    """[b] int64, number of samples in a row; 0 for a filler"""
    weight: Tensor
    """[b, k] fp32, the data's weight of each sample; 0 for a segment without a sample"""
    padding: Tensor
    """[b, s] bool, whether a token belongs to no sample"""
    real_tokens: Tensor
    """[b] int64, number of tokens that are not padding"""
    row: Tensor
    """[b] int64, the row's number, counted through the sources; -1 for a filler"""
    source: Tensor
    """[b] int64, index of the row's source; arbitrary for a filler"""
    cu_seqlens: Tensor | None = None
    """[1, k + 1] int32, the edges of a packed row's segments, from 0 to s; None for padded rows"""
    max_seqlen: Tensor | None = None
    """[1] int64, exact length of a packed row's longest segment, for rotary embedding; None for padded rows"""

    def item(self) -> dict[str, Tensor]:
        """Return the columns that are not None by name, as a dictionary that a data loader can stack."""
        values = ((field.name, getattr(self, field.name)) for field in fields(Columns))
        return {name: value for name, value in values if value is not None}
