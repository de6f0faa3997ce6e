"""Tensors of a model's files that are not trained: layers for multi-token prediction, and a vision part.

They are in no checkpoint. An export has them from the files of the model that the run started from, unchanged bit for
bit. Without those files, config.json of the export announces no layers for multi-token prediction; a model with a
vision part is not exported.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import torch

from bft_megatron.errors import UserError
from bft_megatron.hf import hub, shards
from bft_megatron.hf.model_config import VISION, ModelConfig


def is_carried(name: str, config: ModelConfig) -> bool:
    """Return whether a tensor is not trained; GLM's layers for multi-token prediction are numbered after the others."""
    if config.carried:
        return name.startswith(config.carried)
    layer = re.match(r"model\.layers\.([0-9]{1,6})\.", name)
    return layer is not None and 0 <= int(layer[1]) - config.layers < config.prediction_layers


def check_vision(folder: Path, config: ModelConfig) -> None:
    """Raise UserError if the files of a model with a vision part have none of its tensors, which an export needs."""
    if not config.has_vision:
        return
    files = hub.origin(str(folder))
    if not any(map(_is_vision, entries_of(files))):
        raise UserError(
            f"no tensors {VISION}* of {config.architecture} are here, which an export copies, as they are not trained: "
            "download the whole model",
            str(files),
        )


def outputs(base: Path | None, config: ModelConfig) -> list[shards.Output]:
    """Return these tensors of a model's files, to be written as they are; none if it has none.

    Args:
        base: the folder of the files (`hub.origin`); None: it is not known.

    Raises:
        UserError: the model has a vision part and the files are gone, or a tensor's dtype is not a plain float.
    """
    entries = {name: e for name, e in entries_of(base).items() if is_carried(name, config)}
    if config.has_vision and not any(map(_is_vision, entries)):
        where = "the model that the run started from" if base is None else str(base)
        raise UserError(
            f"{config.architecture} has a vision part, {VISION}*, that is in no checkpoint, and not in {where} any "
            "more: put that model's files back, and export again. Nothing is lost, the checkpoint is whole"
        )
    read = shards.Reader(entries)
    return [shards.Output(name, _dtype(name, e), e.shape, partial(read, name)) for name, e in entries.items()]


def has_prediction(tensors: list[shards.Output]) -> bool:
    """Return whether layers for multi-token prediction are among these tensors."""
    return not all(_is_vision(t.name) for t in tensors)


def announce(tensors: list[shards.Output], config: ModelConfig) -> None:
    """Print what an export has of these tensors, if the model has any."""
    vision = sum(_is_vision(t.name) for t in tensors)
    prediction = len(tensors) - vision
    for part, count in (("vision part", vision), ("multi-token prediction", prediction)):
        if count:
            print(f"{part}: {count} tensors of the base model, unchanged, not trained", flush=True)
    if config.prediction_layers and not prediction:
        print(
            "multi-token prediction: left out, config.json announces none (the base model's weights are not there)",
            flush=True,
        )


def entries_of(base: Path | None) -> dict[str, shards.Entry]:
    """Return the tensors of a model's files; none if the folder is gone, or has lost its weights."""
    try:
        return {} if base is None or not base.is_dir() else shards.read_headers(base)
    except UserError:
        return {}


def _is_vision(name: str) -> bool:
    return name.startswith(VISION)


def _dtype(name: str, entry: shards.Entry) -> torch.dtype:
    if entry.dtype not in shards.DTYPES:
        raise UserError(f"{name} has the dtype {entry.dtype}; can be read: {', '.join(shards.DTYPES)}", str(entry.file))
    return shards.DTYPES[entry.dtype]
