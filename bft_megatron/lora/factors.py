"""The two factors of every adapter: whose matrix they belong to, their shapes, names and cuts over TP.

An adapter adds scale * B A to one Hugging Face matrix [out, in]; A is [rank, in], B [out, rank]. They are rows of the
same kind of table as the weights themselves (`hf.weights`), so that what fills, reads and writes weights does it for
factors too. Nothing here knows Megatron's modules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bft_megatron.hf.architectures import ModelConfig
from bft_megatron.hf.draw import generator
from bft_megatron.hf.weights import HFTensor, Weight, weights
from bft_megatron.recipe.schema import LoraSettings, Recipe


@dataclass(frozen=True)
class Factors:
    """The adapter of one Hugging Face matrix."""

    module: str
    """Last part of the module's name, `q_proj`."""
    a: Weight
    """[rank, in]; its name is the matrix's with `lora_A.weight` in place of `weight`, in checkpoints too."""
    b: Weight
    """[out, rank], `lora_B.weight`"""


@dataclass(frozen=True)
class Adapted:
    """A parameter of Megatron's with an adapter on some or all of the Hugging Face matrices that it joins."""

    weight: Weight
    factors: tuple[Factors | None, ...]
    """One for each of the weight's matrices; None: that one is left as it is."""


def settings_of(recipe: Recipe) -> LoraSettings:
    """The `lora:` of a recipe that has one."""
    assert recipe.lora is not None, "callers ask whether a run has adapters first"
    return recipe.lora


def adapted(config: ModelConfig, settings: LoraSettings) -> list[Adapted]:
    """Every parameter that gets an adapter, in the order of the layers."""
    found = []
    for weight in weights(config):
        factors = tuple(_factors(weight, tensor, settings) for tensor in weight.tensors)
        if any(factors):
            found.append(Adapted(weight, factors))
    return found


def scale(settings: LoraSettings) -> float:
    """What the product B A is multiplied by."""
    return settings.alpha / settings.rank


def _factors(weight: Weight, tensor: HFTensor, settings: LoraSettings) -> Factors | None:
    """None where the tensor is no matrix of a module that the settings name."""
    path, _, kind = tensor.name.rpartition(".")
    module = path.rpartition(".")[2]
    if weight.layer is None or kind != "weight" or module not in settings.modules:
        return None
    rows, columns = tensor.shape
    # A row-parallel matrix is cut along its input, and so is A; a column-parallel one along its output, and so is B.
    a = HFTensor(f"{path}.lora_A.weight", (settings.rank, columns))
    b = HFTensor(f"{path}.lora_B.weight", (rows, settings.rank))
    return Factors(
        module,
        Weight(a.name, None, (a,), 1 if weight.axis == 1 else None),
        Weight(b.name, None, (b,), 0 if weight.axis == 0 else None),
    )


class Fresh:
    """Adapters that change nothing yet, on every layout the same: A as PEFT draws it (Kaiming), by name; B zero.

    Args:
        table: what may be asked for.
        seed: of A.
    """

    def __init__(self, table: list[Adapted], seed: int) -> None:
        self._shapes = {t.name: t.shape for w in all_factors(table) for t in w.tensors}
        self._seed = seed

    def __call__(self, name: str, axis: int | None, start: int, stop: int) -> Tensor:
        """Indices start to stop along an axis (None: all) of a factor, fp32: drawn whole, its scale that of the whole
        input.
        """
        shape = self._shapes[name]
        if name.endswith(".lora_B.weight"):
            whole = torch.zeros(shape)
        else:
            bound = 1 / math.sqrt(shape[1])  # kaiming_uniform_ with a = sqrt(5)
            whole = torch.rand(shape, generator=generator(self._seed, name)) * (2 * bound) - bound
        return whole if axis is None else whole.narrow(axis, start, stop - start)


def all_factors(table: list[Adapted]) -> list[Weight]:
    """Every A and B of a table."""
    return [w for entry in table for f in entry.factors if f is not None for w in (f.a, f.b)]
