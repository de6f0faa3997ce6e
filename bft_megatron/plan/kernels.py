"""The definition of operators that compute shapes only, which stand for a GPU's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import library

_LIBRARY = library.Library("bft_plan", "DEF")
OPS = torch.ops.bft_plan
"""The defined operators."""


def kernel(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Define an operator whose outputs the decorated function allocates on the meta device."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    return lambda shapes: library.impl(_LIBRARY, name, "Meta")(shapes)
