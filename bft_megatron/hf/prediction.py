"""Layers for multi-token prediction, which lie after a model's own in its files: not trained, and in no checkpoint.

An export has them from the model that the run started from, unchanged, or its config.json announces none.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import torch

from bft_megatron.errors import UserError
from bft_megatron.hf import hub, shards
from bft_megatron.hf.model_config import ModelConfig

KEY = "num_nextn_predict_layers"
"""The key of config.json with their number."""


def is_predicting(name: str, config: ModelConfig) -> bool:
    """Return whether a tensor belongs to one of these layers."""
    layer = re.match(r"model\.layers\.([0-9]{1,6})\.", name)
    return layer is not None and 0 <= int(layer[1]) - config.layers < config.prediction_layers


def carried(base: Path | None, config: ModelConfig) -> list[shards.Output]:
    """Return these layers' tensors of a model folder, to be written as they are; none if it has none or is gone.

    Raises:
        UserError: a tensor has a dtype that is not a plain float.
    """
    if not config.prediction_layers or base is None or hub.checkpoints_of(base):
        return []
    entries = {name: e for name, e in _entries(base).items() if is_predicting(name, config)}
    read = shards.Reader(entries)
    return [
        shards.Output(name, _dtype(name, e), e.shape, partial(read, name, None, 0, 0)) for name, e in entries.items()
    ]


def announce(config: ModelConfig, tensors: list[shards.Output]) -> None:
    """Print what an export has of these layers, if the model has any."""
    if config.prediction_layers and tensors:
        print(f"multi-token prediction: {len(tensors)} tensors of the base model, unchanged, not trained", flush=True)
    elif config.prediction_layers:
        print(f"multi-token prediction: left out, {KEY} is 0 (the base model's weights are not there)", flush=True)


def _entries(base: Path) -> dict[str, shards.Entry]:
    try:
        return shards.read_headers(base)
    except UserError:  # of a model folder that has lost its weights since
        return {}


def _dtype(name: str, entry: shards.Entry) -> torch.dtype:
    if entry.dtype not in shards.DTYPES:
        raise UserError(f"{name} has the dtype {entry.dtype}; can be read: {', '.join(shards.DTYPES)}", str(entry.file))
    return shards.DTYPES[entry.dtype]
