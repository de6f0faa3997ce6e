"""The tensors of a Hugging Face model's files, and the parameters that Megatron joins them to.

A Megatron parameter joins one or more tensors by rows, in `blocks`: query, key and value are interleaved per key/value
group, gate and up are stacked in one block. Under tensor parallelism a rank holds its part of *every* joined tensor,
joined by the same rule. Rows of a larger tensor of the files are a tensor of their own here where Megatron has them
apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The place of some rows in a larger tensor: as many in each of its blocks of rows."""

    shape: tuple[int, ...]
    """The larger tensor's shape."""
    blocks: int = 1
    first: int = 0
    """Number of the first row within a block."""
    lead: int | None = None
    """Index in a leading dimension, such as the expert's; None: the larger tensor has none."""

    @property
    def in_block(self) -> int:
        """Return the number of rows of a block of the larger tensor."""
        return self.shape[0 if self.lead is None else 1] // self.blocks


@dataclass(frozen=True)
class HFTensor:
    """A tensor of the Hugging Face model's files, or some rows of one."""

    name: str
    """The name of the tensor in the files."""
    shape: tuple[int, ...]
    rows: Rows | None = None
    """Where in the files' tensor these rows are; None: they are all of it."""

    @property
    def whole(self) -> HFTensor:
        """Return the tensor of the files."""
        return self if self.rows is None else HFTensor(self.name, self.rows.shape)

    def read(self, index: Callable[[tuple[Any, ...]], Tensor], axis: int | None, start: int, stop: int) -> Tensor:
        """Return indices [start, stop) of these rows along an axis, or all if it is None.

        Args:
            index: indexes the files' tensor. Of rows in several blocks, whole blocks are asked for.
            start, stop: for such rows along axis 0, multiples of their number in a block.
        """
        along = slice(None) if axis is None else slice(start, stop)
        if self.rows is None:
            return index((slice(None), along) if axis == 1 else (along,))
        first, last = (start, stop) if axis == 0 else (0, self.shape[0])
        columns = (along,) if axis == 1 else ()
        lead = () if self.rows.lead is None else (self.rows.lead,)
        if self.rows.blocks == 1:
            return index((*lead, slice(self.rows.first + first, self.rows.first + last), *columns))
        own, all_rows = self.shape[0] // self.rows.blocks, self.rows.in_block
        assert first % own == last % own == 0, f"{self.name}: rows {first} to {last} are not whole blocks of {own}"
        blocks = index((*lead, slice(first // own * all_rows, last // own * all_rows), *columns))
        return self._of_blocks(blocks).flatten(0, 1)

    def put(self, value: Tensor, whole: Tensor) -> None:
        """Write these rows into the files' tensor."""
        if self.rows is None:
            whole.copy_(value)
            return
        own = self._of_blocks(whole if self.rows.lead is None else whole[self.rows.lead])
        own.copy_(value.view(own.shape))

    def _of_blocks(self, rows: Tensor) -> Tensor:
        """Return these rows of whole blocks, [blocks, rows, ...], a view."""
        assert self.rows is not None
        first, own = self.rows.first, self.shape[0] // self.rows.blocks
        blocks: Tensor = rows.unflatten(0, (-1, self.rows.in_block))
        return blocks[:, first : first + own]


def split(whole: HFTensor, *sizes: int, blocks: int = 1) -> list[HFTensor]:
    """Return a tensor's rows as several: of each of its blocks of rows, the first sizes[0] / blocks, and so on."""
    found, first = [], 0
    for size in sizes:
        rows = Rows(whole.shape, blocks, first)
        found.append(replace(whole, shape=(size, *whole.shape[1:]), rows=rows))
        first += size // blocks
    return found


@dataclass(frozen=True)
class Weight:
    """A whole parameter of Megatron's model (not sharded over TP) and its Hugging Face tensors."""

    name: str
    """Name within its layer, or within the model, as in a checkpoint, where norms have Transformer Engine's names and
    all experts one name, such as `mlp.experts.experts.linear_fc1.weight`."""
    layer: int | None
    """Layer number from 0 over the whole model; None outside the layers."""
    tensors: tuple[HFTensor, ...]
    axis: int | None
    """The axis that is sharded over TP, of an expert over expert-TP; None: every rank has the whole parameter."""
    blocks: int = 1
    """Number of blocks of rows in which the tensors are interleaved; TP shards the blocks too."""
    padded: bool = False
    """Whether the rows are the vocabulary, to which Megatron adds rows of zeros."""
    expert: int | None = None
    """Expert number from 0 over the whole layer; None outside the experts."""
    buffer: bool = False
    """Whether it is a buffer, which no gradient changes."""
    fp32: bool = False
    """Whether it is fp32 beside weights of any dtype."""
    sections: tuple[str, ...] = ()
    """Names of the tensors, if a checkpoint stores each under a key of its own, such as `...in_proj.weight.query`."""

    @property
    def path(self) -> str:
        """Name in the whole model, such as `decoder.layers.7.mlp.experts.3.linear_fc1.weight`."""
        name = self.name if self.expert is None else self.name.replace(".experts.experts.", f".experts.{self.expert}.")
        return name if self.layer is None else f"decoder.layers.{self.layer}.{name}"

    @property
    def stored(self) -> list[Weight]:
        """The weights that a checkpoint stores it as: one for each section, or itself."""
        if not self.sections:
            return [self]
        parts = zip(self.sections, self.tensors, strict=True)
        return [replace(self, name=f"{self.name}.{s}", tensors=(t,), blocks=1, sections=()) for s, t in parts]


def join(tensors: Sequence[Tensor], blocks: int) -> Tensor:
    """Join tensors [rows_i, ...] as Megatron does, [sum of rows_i, ...]: each block has a part of every tensor."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat([t.unflatten(0, (blocks, -1)) for t in tensors], 1).flatten(0, 1)


def part(weight: Weight, index: int, joined: Tensor) -> Tensor:
    """Return the Hugging Face tensor number `index` of a whole joined parameter: the inverse of `join`."""
    rows = [t.shape[0] // weight.blocks for t in weight.tensors]
    first = sum(rows[:index])
    blocks: Tensor = joined.unflatten(0, (weight.blocks, -1))
    return blocks[:, first : first + rows[index]].flatten(0, 1)
