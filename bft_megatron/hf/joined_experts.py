"""Files in which all experts of a layer are two tensors, `gate_up_proj` and `down_proj`, or have a tensor each.

The table of `weights` has a tensor an expert. Both forms are read, and an export writes that of the base model's files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bft_megatron.hf import shards
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.hf.tensors import HFTensor
from bft_megatron.hf.weights import weights


def as_in(names: Iterable[str], config: ModelConfig) -> ModelConfig:
    """Return the configuration of a model whose files have these tensors."""
    layers = f"{config.prefix}layers."
    if config.experts is None or not any(n.startswith(layers) and n.endswith(".gate_up_proj") for n in names):
        return config
    return replace(config, experts=replace(config.experts, names=replace(config.experts.names, joined=True)))


def places_in(names: Iterable[str], config: ModelConfig) -> dict[HFTensor, HFTensor]:
    """Return the table's tensors, each with the one, or the rows of one, that it is in files with these tensors."""
    own, there = weights(config), as_in(names, config)
    others = own if there is config else weights(there)
    pairs = zip(own, others, strict=True)
    return {t: rows for weight, other in pairs for t, rows in zip(weight.tensors, other.tensors, strict=True)}


def join(tensors: list[shards.Output], names: Iterable[str], config: ModelConfig) -> list[shards.Output]:
    """Return tensors of the table as those of files with these tensors; each reads its rows one after the other."""
    places = places_in(names, config).items()
    there = {t.name: place for t, place in places if place.rows is not None and place.rows.lead is not None}
    found: dict[str, shards.Output] = {}
    rows: dict[HFTensor, list[tuple[HFTensor, shards.Output]]] = {}
    for output in tensors:
        place = there.get(output.name)
        if place is None:
            found[output.name] = output
            continue
        rows.setdefault(place.whole, []).append((place, output))
        read = partial(_joined, place.whole, rows[place.whole])
        found[place.name] = replace(output, name=place.name, shape=place.whole.shape, read=read)
    return list(found.values())


def _joined(whole: HFTensor, rows: list[tuple[HFTensor, shards.Output]]) -> Tensor:
    out = torch.empty(whole.shape, dtype=rows[0][1].dtype)
    for place, output in rows:
        place.put(output.read(), out)
    return out
