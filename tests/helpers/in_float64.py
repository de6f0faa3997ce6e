"""transformers' modelling code of hybrids without its casts to fp32, as a reference in float64."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import transformers

REPLACED = {
    "torch.float32": "torch.float64",
    ".float()": ".double()",
    "dtype=torch.float,": "dtype=torch.double,",
    # The same rule in smaller chunks, whose tokens it takes one by one: the samples are short.
    "chunk_size: int = 64": "chunk_size: int = 16",
}


@functools.cache
def model_class(architecture: str) -> Any:
    """A class of transformers from a copy of its module in which casts to fp32 are casts to float64."""
    spec = importlib.util.find_spec(getattr(transformers, architecture).__module__)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    with open(str(spec.origin)) as file:
        source = file.read()
    for cast, wider in REPLACED.items():
        assert cast in source or cast.endswith(","), f"{architecture} has no {cast}"
        source = source.replace(cast, wider)
    exec(compile(source, str(spec.origin), "exec"), module.__dict__)
    return getattr(module, architecture)
