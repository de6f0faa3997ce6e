"""Packing samples into rows by best-fit decreasing. Building a row's tensors is in `dataset`."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], seq_length: int, pad_multiple: int) -> list[list[int]]:
    """Pack samples into rows by best-fit decreasing: longest first, each into the fullest row that has space for it.

    A sample takes its length rounded up to a multiple of `pad_multiple`. Rows with the same space left are
    interchangeable, so one sorted list of the distinct spaces is enough to find a row: O(n log n) comparisons. The
    result is deterministic.

    Args:
        lengths: tokens of each sample, 1 to seq_length.
        seq_length: tokens of a row, a multiple of `pad_multiple`.
        pad_multiple: the multiple that a sample's length is padded to.

    Returns:
        The samples of each row, as indices into `lengths`.

    Raises:
        ValueError: a length is out of range, or seq_length is not a multiple of `pad_multiple`.
    """
    if seq_length % pad_multiple:
        raise ValueError(f"seq_length {seq_length} is no multiple of pad_multiple {pad_multiple}")
    if len(lengths) and not 1 <= min(lengths) <= max(lengths) <= seq_length:
        raise ValueError(f"lengths from {min(lengths)} to {max(lengths)} in rows of {seq_length}")
    rows: list[list[int]] = []
    spaces: list[int] = []  # distinct spaces left in rows, ascending
    rows_with: dict[int, list[int]] = {}  # space left -> rows
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        size = padded(lengths[sample], pad_multiple)
        at = bisect_left(spaces, size)
        if at < len(spaces):
            space = spaces[at]
            row = rows_with[space].pop()
            if not rows_with[space]:
                del spaces[at]
        else:
            space, row = seq_length, len(rows)
            rows.append([])
        rows[row].append(sample)
        left = space - size
        if not rows_with.setdefault(left, []):
            insort(spaces, left)
        rows_with[left].append(row)
    return rows


def padded(length: int, multiple: int) -> int:
    """Return `length` rounded up to a multiple."""
    return -(-length // multiple) * multiple
