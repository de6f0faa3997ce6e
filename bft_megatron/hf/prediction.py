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
from bft_megatron.hf.architectures import PREDICTION_LAYERS
from bft_megatron.hf.model_config import ModelConfig


def is_predicting(name: str, config: ModelConfig) -> bool:
    """Return whether a tensor belongs to one of these layers."""
    if name.startswith(config.carried):
        return bool(config.carried)
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
    return [shards.Output(name, _dtype(name, e), e.shape, partial(read, name)) for name, e in entries.items()]


def announce(config: ModelConfig, tensors: list[shards.Output]) -> None:
    """Print what an export has of these layers, if the model has any."""
    if not config.prediction_layers:
        return
    what = f"left out, {PREDICTION_LAYERS} is 0 (the base model's weights are not there)"
    if tensors:
        what = f"{len(tensors)} tensors of the base model, unchanged, not trained"
    print(f"multi-token prediction: {what}", flush=True)


def _entries(base: Path) -> dict[str, shards.Entry]:
    try:
        return shards.read_headers(base)
    except UserError:  # of a model folder that has lost its weights since
        return {}


def _dtype(name: str, entry: shards.Entry) -> torch.dtype:
    if entry.dtype not in shards.DTYPES:
        raise UserError(f"{name} has the dtype {entry.dtype}; can be read: {', '.join(shards.DTYPES)}", str(entry.file))
    return shards.DTYPES[entry.dtype]
