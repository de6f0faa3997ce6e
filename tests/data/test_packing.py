"""Packing: nothing lost, nothing over length, the same every time, and full rows."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bft_megatron.data.packing import pack, padded


@given(st.data(), st.sampled_from([1, 2, 4, 16]), st.integers(1, 16))
def test_every_sample_once_and_no_row_over_length(data: st.DataObject, multiple: int, units: int) -> None:
    size = multiple * units
    lengths = data.draw(st.lists(st.integers(1, size), max_size=60))
    rows = pack(lengths, size, multiple)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    assert all(0 < sum(padded(lengths[sample], multiple) for sample in row) <= size for row in rows)
    assert pack(lengths, size, multiple) == rows


def test_best_fit_decreasing_by_hand() -> None:
    # 6 opens a row with 4 left, 5 one with 5 left; 4 fills the first; 3 goes to the second, which is too full for 3.
    assert pack([3, 5, 4, 6, 3], 10, 1) == [[3, 2], [1, 0], [4]]
    # 7 and 6 open rows with 3 and 4 left: 3 takes the tighter one though the other has room, 2 and 1 what is left.
    assert pack([6, 7, 1, 2, 3], 10, 1) == [[1, 4], [0, 3, 2]]


def test_lengths_count_as_padded() -> None:
    assert pack([5, 4], 8, 4) == [[0], [1]]
    assert pack([5, 4], 9, 1) == [[0, 1]]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_no_two_rows_would_fit_into_one(lengths: list[int]) -> None:
    """What a row would have been opened for in vain: any-fit leaves at most one row half empty."""
    fills = [sum(lengths[sample] for sample in row) for row in pack(lengths, 20, 1)]
    assert sum(fill <= 10 for fill in fills) <= 1


def test_rows_are_full_of_short_answers() -> None:
    """98 % at 4,096, padded for context parallelism 2: answers of 40 tokens, and of about 40 with their padding."""
    rows = pack([40] * 10_000, 4096, 4)
    assert 40 * 10_000 / (len(rows) * 4096) >= 0.98
    lengths = [random.Random(i).randint(20, 60) for i in range(10_000)]
    rows = pack(lengths, 4096, 4)
    assert sum(padded(length, 4) for length in lengths) / (len(rows) * 4096) >= 0.98


def test_rows_are_full_of_long_conversations() -> None:
    lengths = [min(4096, int(random.Random(i).lognormvariate(6.2, 0.8)) + 1) for i in range(10_000)]
    assert sum(lengths) / (len(pack(lengths, 4096, 4)) * 4096) >= 0.98


@pytest.mark.parametrize(("lengths", "size", "multiple"), [([0], 8, 1), ([9], 8, 1), ([1], 10, 4)])
def test_what_cannot_be_packed_is_refused(lengths: list[int], size: int, multiple: int) -> None:
    with pytest.raises(ValueError, match=r"seq_length|lengths"):
        pack(lengths, size, multiple)


def test_no_samples_no_rows() -> None:
    assert pack([], 8, 1) == []
