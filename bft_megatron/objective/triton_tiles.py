"""Triton kernels for the two passes of sums.py over a part of the vocabulary, for GPUs: one program a row.

The kernels use no atomics, so they give the same bits every time; matrix products are left to cuBLAS. They are tested
against sums.py through Triton's interpreter, and on the GPUs of tested_cards.py, where they are the default.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bft_megatron.objective import sums as plain
from bft_megatron.objective.sums import Kernels, Labels, Sums, no_sums

_LOG2E = tl.constexpr(plain.LOG2E)
_LOWEST = tl.constexpr(plain.LOWEST)
LAUNCHES = {1: (4096, 4)}
"""From this number of columns on: the most columns that a program holds at a time, and its warps.

`benchmarks.gpu.blocks` times others. Triton's own autotuning would choose anew in each run, and a block of another size
adds in another order, which gives other bits.
"""


@triton.jit
def _sums_of_row(  # type: ignore[no-untyped-def]  # Triton takes annotations for its own types
    X, HOLE, SUPERVISED, TOP, OTHERS, WEIGHTED, columns, stride, ENTROPY: tl.constexpr, BLOCK: tl.constexpr
) -> None:  # fmt: skip
    """Write TOP fp32, OTHERS and WEIGHTED fp64, each [n], of X [n, columns] without column HOLE, if SUPERVISED."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(SUPERVISED + row) != 0:
        hole = tl.load(HOLE + row)
        top = tl.full((), _LOWEST, tl.float32)
        shift = tl.ceil(top * _LOG2E)
        others = tl.zeros((), tl.float64)
        weighted = tl.zeros((), tl.float64)
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(X + row * stride + at, mask=at < columns, other=-float("inf")).to(tl.float32)
            x = tl.where(at == hole, -float("inf"), x)
            top = tl.maximum(top, tl.max(x, 0))
            higher = tl.ceil(top * _LOG2E)
            step = (shift - higher).to(tl.float64)
            scale = tl.exp2(step)  # of an integer: exact
            y = tl.fma(x, tl.full((BLOCK,), _LOG2E, tl.float32), -higher)
            e = tl.exp2(y)
            if ENTROPY:
                here = tl.sum(tl.where(e > 0, y * e, 0.0), 0).to(tl.float64)
                weighted = scale * (weighted + tl.where(others > 0, step * others, 0.0)) + here
            others = scale * others + tl.sum(e, 0).to(tl.float64)
            shift = higher
        tl.store(TOP + row, top)
        tl.store(OTHERS + row, others)
        if ENTROPY:
            tl.store(WEIGHTED + row, weighted)


@triton.jit
def _gradient_of_row(  # type: ignore[no-untyped-def]  # Triton takes annotations for its own types
    X, OUT, HOLE, SUPERVISED, SHIFT, AT_OTHERS, AT_LABEL, columns, stride, stride_out, BLOCK: tl.constexpr
) -> None:  # fmt: skip
    """Write into OUT [n, columns], which may be X: 2^y AT_OTHERS, AT_LABEL at column HOLE, 0 where not SUPERVISED."""
    row = tl.program_id(0).to(tl.int64)
    supervised = tl.load(SUPERVISED + row) != 0
    hole = tl.load(HOLE + row)
    shift = tl.load(SHIFT + row)
    at_others = tl.load(AT_OTHERS + row)
    at_label = tl.load(AT_LABEL + row)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        x = tl.load(X + row * stride + at, mask=inside & supervised, other=-float("inf")).to(tl.float32)
        y = tl.fma(x, tl.full((BLOCK,), _LOG2E, tl.float32), -shift)
        value = tl.where(at == hole, at_label, tl.exp2(y) * at_others)
        value = tl.where(supervised, value, 0.0)
        tl.store(OUT + row * stride_out + at, value.to(OUT.dtype.element_ty), mask=inside)


def sums(rows: Tensor, label: Labels, *, entropy: bool = False, keep_numerators: bool = False) -> Sums:
    """Do what `sums.sums` does, except that the rows are only read: TRITON keeps no numerators."""
    found = no_sums(len(rows), rows.device, entropy)
    if not label.columns or not len(rows):
        return found
    at_column = rows.gather(1, label.column[:, None])[:, 0].double()
    _sums_of_row[(len(rows),)](
        rows,
        _hole(label),
        label.supervised.to(torch.int8),
        found.top,
        found.others,
        found.weighted,
        label.columns,
        rows.stride(0),
        ENTROPY=entropy,
        **_launch(label.columns),
    )
    return Sums(found.top, found.others, torch.where(label.owned, at_column, 0.0), found.weighted)


def gradient(
    rows: Tensor, out: Tensor, label: Labels, shift: Tensor | None, at_others: Tensor, at_label: Tensor
) -> None:
    """Do what `sums.gradient` does, from logits only."""
    assert shift is not None, "there are no numerators"
    if label.columns and len(rows):
        _gradient_of_row[(len(rows),)](
            rows,
            out,
            _hole(label),
            label.supervised.to(torch.int8),
            shift,
            at_others,
            at_label,
            label.columns,
            rows.stride(0),
            out.stride(0),
            **_launch(label.columns),
        )


TRITON = Kernels(sums, gradient, numerators=False)


def _hole(label: Labels) -> Tensor:
    """Return the label's column, -1 where the part owns none, [n] int64; no lane past the last column equals it."""
    return torch.where(label.owned, label.column, -1)


def _launch(columns: int) -> dict[str, int]:
    block, warps = LAUNCHES[max(least for least in LAUNCHES if least <= columns)]
    return {"BLOCK": min(block, int(triton.next_power_of_2(columns))), "num_warps": warps}
