"""The factors A and B of every adapter: the matrix they belong to, their shapes, names and sharding over TP.

An adapter adds scale * B A to one Hugging Face matrix [out, in]; A is [rank, in], B [out, rank]. The factors are rows
of the same kind of table as the weights themselves (`hf.weights`), so the code that fills, reads and writes weights
works for factors too. Nothing here depends on Megatron's modules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bft_megatron.hf.draw import generator
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.hf.weights import HFTensor, Weight, weights
from bft_megatron.recipe.schema import LoraSettings, Recipe


@dataclass(frozen=True)
class Factors:
    """The factors of one Hugging Face matrix."""

    module: str
    """Last part of the module's name, such as `q_proj`."""
    a: Weight
    """[rank, in]; named like the matrix, with `lora_A.weight` in place of `weight`, in checkpoints too."""
    b: Weight
    """[out, rank]; `lora_B.weight`."""


@dataclass(frozen=True)
class Adapted:
    """A parameter of Megatron with adapters on some or all of the Hugging Face matrices that it joins."""

    weight: Weight
    factors: tuple[Factors | None, ...]
    """One entry for each of the weight's matrices; None: a matrix without adapter."""


def settings_of(recipe: Recipe) -> LoraSettings:
    """The `lora:` of a recipe that has one."""
    assert recipe.lora is not None, "callers ask whether a run has adapters first"
    return recipe.lora


def adapted(config: ModelConfig, settings: LoraSettings) -> list[Adapted]:
    """Return every parameter that gets an adapter, in the order of the layers."""
    found = []
    for weight in weights(config):
        factors = tuple(_factors(weight, tensor, settings) for tensor in weight.tensors)
        if any(factors):
            found.append(Adapted(weight, factors))
    return found


def scale(settings: LoraSettings) -> float:
    """Return the factor of the product B A: alpha / rank."""
    return settings.alpha / settings.rank


def _factors(weight: Weight, tensor: HFTensor, settings: LoraSettings) -> Factors | None:
    """Return a tensor's factors, or None if it is not the matrix of a module that the settings name."""
    path, _, kind = tensor.name.rpartition(".")
    module = path.rpartition(".")[2]
    if weight.layer is None or kind != "weight" or module not in settings.modules:
        return None
    rows, columns = tensor.shape
    # A row-parallel matrix is sharded along its input, and so is A; a column-parallel one along its output, as is B.
    a = HFTensor(f"{path}.lora_A.weight", (settings.rank, columns))
    b = HFTensor(f"{path}.lora_B.weight", (rows, settings.rank))
    return Factors(
        module,
        Weight(a.name, None, (a,), 1 if weight.axis == 1 else None),
        Weight(b.name, None, (b,), 0 if weight.axis == 0 else None),
    )


class Fresh:
    """A source of new adapters, the same in every layout: A drawn by name as in PEFT (Kaiming uniform), B zero.

    Args:
        table: the parameters that get adapters.
        seed: seed of A.
    """

    def __init__(self, table: list[Adapted], seed: int) -> None:
        self._shapes = {t.name: t.shape for w in all_factors(table) for t in w.tensors}
        self._seed = seed

    def __call__(self, name: str, axis: int | None, start: int, stop: int) -> Tensor:
        """Return [start, stop) along an axis (None: all) of a factor, fp32.

        The whole factor is drawn, so its scale depends on the whole input size in every layout.
        """
        shape = self._shapes[name]
        if name.endswith(".lora_B.weight"):
            whole = torch.zeros(shape)
        else:
            bound = 1 / math.sqrt(shape[1])  # kaiming_uniform_ with a = sqrt(5)
            whole = torch.rand(shape, generator=generator(self._seed, name)) * (2 * bound) - bound
        return whole if axis is None else whole.narrow(axis, start, stop - start)


def all_factors(table: list[Adapted]) -> list[Weight]:
    """Return every A and B of a table."""
    return [w for entry in table for f in entry.factors if f is not None for w in (f.a, f.b)]
