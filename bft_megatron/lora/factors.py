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
from bft_megatron.hf.tensors import HFTensor, Weight
from bft_megatron.hf.weights import weights
from bft_megatron.recipe.schema import LORA_TARGETS, LoraSettings, Recipe


@dataclass(frozen=True)
class Factors:
    """The factors of one Hugging Face matrix."""

    module: str
    """The module's name in `lora.target`, such as `q_proj`."""
    a: Weight
    """[rank, in]; named like the matrix, with `lora_A.weight` in place of `weight`, in checkpoints too. There all
    experts of a layer are one tensor, [experts, rank, in], whose name has no expert's number, as with their weights."""
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
    own_names = dict(zip(config.experts.names.matrices, LORA_TARGETS["mlp"], strict=True)) if config.experts else {}
    for weight in weights(config):
        factors = tuple(_factors(weight, tensor, settings, own_names) for tensor in weight.tensors)
        if any(factors):
            found.append(Adapted(weight, factors))
    return found


def scale(settings: LoraSettings) -> float:
    """Return the factor of the product B A: alpha / rank."""
    return settings.alpha / settings.rank


def _factors(weight: Weight, tensor: HFTensor, settings: LoraSettings, own_names: dict[str, str]) -> Factors | None:
    """Return a tensor's factors, or None if it is not the matrix of a module that the settings name.

    Args:
        own_names: the names in `lora.target` of matrices that the model's files name otherwise.
    """
    path, _, kind = tensor.name.rpartition(".")
    last = path.rpartition(".")[2]
    module = own_names.get(last, last)
    if weight.layer is None or kind != "weight" or module not in settings.modules:
        return None
    if weight.expert is not None and not settings.experts:
        return None
    rows, columns = tensor.shape
    # A row-parallel matrix is sharded along its input, and so is A; a column-parallel one along its output, as is B.
    a = _factor(weight, HFTensor(f"{path}.lora_A.weight", (settings.rank, columns)), axis=1)
    b = _factor(weight, HFTensor(f"{path}.lora_B.weight", (rows, settings.rank)), axis=0)
    return Factors(module, a, b)


def _factor(weight: Weight, tensor: HFTensor, axis: int) -> Weight:
    """Return a factor of one of a weight's matrices; it is sharded along `axis` if the matrix is."""
    key = tensor.name if weight.expert is None else tensor.name.replace(f".experts.{weight.expert}.", ".experts.")
    return Weight(key, None, (tensor,), axis if weight.axis == axis else None, expert=weight.expert)


class Fresh:
    """A source of new adapters, the same in every layout: A drawn by name as in PEFT (Kaiming uniform), B zero.

    Args:
        seed: seed of A.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, factor: HFTensor, axis: int | None, start: int, stop: int) -> Tensor:
        """Return [start, stop) along an axis (None: all) of a factor, fp32.

        The whole factor is drawn, so its scale depends on the whole input size in every layout.
        """
        name, shape = factor.name, factor.whole.shape
        if name.endswith(".lora_B.weight"):
            whole = torch.zeros(shape)
        else:
            bound = 1 / math.sqrt(shape[1])  # kaiming_uniform_ with a = sqrt(5)
            whole = torch.rand(shape, generator=generator(self._seed, name)) * (2 * bound) - bound
        return factor.read(lambda index: whole[index], axis, start, stop)


def all_factors(table: list[Adapted]) -> list[Weight]:
    """Return every A and B of a table."""
    return [w for entry in table for f in entry.factors if f is not None for w in (f.a, f.b)]
