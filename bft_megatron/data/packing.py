"""Which samples share a row: best-fit decreasing. What a row holds is in `dataset`."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], seq_length: int, pad_multiple: int) -> list[list[int]]:
    """Put samples into rows by best-fit decreasing: the longest first, each where it leaves the least space.

    A sample takes its length rounded up to a multiple of `pad_multiple`. Rows with the same space left are
    interchangeable, so one sorted list of the spaces that occur finds the row: O(n log n) comparisons. The same input
    gives the same rows.

    Args:
        lengths: tokens of each sample, 1 to seq_length.
        seq_length: tokens of a row, a multiple of `pad_multiple`.
        pad_multiple: what a sample is padded to a multiple of.

    Returns:
        The samples of each row, as indices into `lengths`.

    Raises:
        ValueError: a length or the row does not fit the above.
    """
    if seq_length % pad_multiple:
        raise ValueError(f"seq_length {seq_length} is no multiple of pad_multiple {pad_multiple}")
    if len(lengths) and not 1 <= min(lengths) <= max(lengths) <= seq_length:
        raise ValueError(f"lengths from {min(lengths)} to {max(lengths)} in rows of {seq_length}")
    rows: list[list[int]] = []
    spaces: list[int] = []  # those that occur, ascending
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
    """`length` rounded up to a multiple."""
    return -(-length // multiple) * multiple
