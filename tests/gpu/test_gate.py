"""Parameters on a GPU that are not finite are found, and the host does not wait for the answer."""

from __future__ import annotations

import math

import pytest
import torch

from bft_megatron.checkpoint.gate import finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_value_among_many_is_found_without_waiting(dtype: torch.dtype, no_waiting: None):
    values = [torch.full((3, 123457), 3e38, dtype=dtype, device="cuda") for _ in range(4)]
    answers = [finite(values)]
    for tensor, bad in zip(values[1:], (math.nan, math.inf, -math.inf), strict=True):
        tensor[1, 99991] = bad
        answers.append(finite([values[0], tensor]))
    torch.cuda.set_sync_debug_mode("default")
    assert [bool(answer) for answer in answers] == [True, False, False, False]
