"""The factors A and B of every adapter: the matrix they belong to, their shapes, names and sharding over TP.

An adapter adds scale * B A to one Hugging Face matrix [out, in]; A is [rank, in], B [out, rank]. The factors are rows
of the same kind of table as the weights themselves (`hf.weights`), so the code that fills, reads and writes weights
works for factors too. Nothing here depends on Megatron's modules.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

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
    matrix: HFTensor
    """The matrix itself, [out, in]."""
    a: Weight
    """[rank, in]; named like the matrix, with `lora_A.weight` in place of `weight`, in checkpoints too. There all
    experts of a layer are one tensor, [experts, rank, in], whose name has no expert's number, as with their weights."""
    b: tuple[Weight, ...]
    """[out, rank], `lora_B.weight`: one weight for each part of the matrix that Megatron has apart, which a checkpoint
    has by its number, as in `lora_B.weight.0`; without a number where the matrix has no parts."""


@dataclass(frozen=True)
class Adapted:
    """A parameter of Megatron with adapters on some or all of the Hugging Face matrices that it joins."""

    weight: Weight
    parts: tuple[tuple[Factors, Weight] | None, ...]
    """One entry for each of the weight's tensors: the factors of its matrix, and the rows of B that are the tensor's;
    None: a matrix without adapter."""

    @property
    def factors(self) -> list[Factors]:
        """Return the factors of each adapted matrix, in the order of the tensors."""
        return list({p[0].module: p[0] for p in self.parts if p is not None}.values())


def settings_of(recipe: Recipe) -> LoraSettings:
    """The `lora:` of a recipe that has one."""
    assert recipe.lora is not None, "callers ask whether a run has adapters first"
    return recipe.lora


def adapted(config: ModelConfig, settings: LoraSettings) -> list[Adapted]:
    """Return every parameter that gets an adapter, in the order of the layers."""
    found = []
    own_names = dict(zip(config.experts.names.matrices, LORA_TARGETS["mlp"], strict=True)) if config.experts else {}
    for weight in weights(config):
        modules = [_module(weight, tensor, settings, own_names) for tensor in weight.tensors]
        if any(modules):
            found.append(Adapted(weight, _parts(weight, modules, settings.rank)))
    return found


def scale(settings: LoraSettings) -> float:
    """Return the factor of the product B A: alpha / rank."""
    return settings.alpha / settings.rank


def _module(weight: Weight, tensor: HFTensor, settings: LoraSettings, own_names: dict[str, str]) -> str | None:
    """Return the name of a tensor's module if the settings name it and the tensor is its matrix, or rows of it.

    Args:
        own_names: the names in `lora.target` of matrices that the model's files name otherwise.
    """
    path, _, kind = tensor.name.rpartition(".")
    last = path.rpartition(".")[2]
    module = own_names.get(last, last)
    if weight.layer is None or kind != "weight" or module not in settings.modules:
        return None
    return module if weight.expert is None or settings.experts else None


def _parts(weight: Weight, modules: list[str | None], rank: int) -> tuple[tuple[Factors, Weight] | None, ...]:
    """Return the entries of `Adapted.parts` by the module of each of a weight's tensors."""
    own: dict[str, list[HFTensor]] = {}
    for module, tensor in zip(modules, weight.tensors, strict=True):
        if module is not None:
            own.setdefault(module, []).append(tensor)
    factors = {module: _factors(weight, module, tensors, rank) for module, tensors in own.items()}
    rows = {module: iter(f.b) for module, f in factors.items()}
    return tuple(None if m is None else (factors[m], next(rows[m])) for m in modules)


def _factors(weight: Weight, module: str, parts: list[HFTensor], rank: int) -> Factors:
    """Return the factors of a matrix that a weight has in these parts."""
    matrix = parts[0].whole
    path, (rows, columns) = matrix.name.removesuffix(".weight"), matrix.shape
    # A row-parallel matrix is sharded along its input, and so is A; a column-parallel one along its output, as is B.
    a = _factor(weight, HFTensor(f"{path}.lora_A.weight", (rank, columns)), axis=1)
    b = HFTensor(f"{path}.lora_B.weight", (rows, rank))
    if len(parts) == 1:
        return Factors(module, matrix, a, (_factor(weight, b, axis=0),))
    places = [replace(p.rows, shape=b.shape) for p in parts if p.rows is not None]
    own = [replace(b, shape=(p.shape[0], rank), rows=at) for p, at in zip(parts, places, strict=True)]
    numbered = tuple(_factor(weight, t, axis=0, number=f".{i}") for i, t in enumerate(own))
    return Factors(module, matrix, a, numbered)


def _factor(weight: Weight, tensor: HFTensor, axis: int, number: str = "") -> Weight:
    """Return a factor of one of a weight's matrices; it is sharded along `axis` if the matrix is."""
    key = tensor.name if weight.expert is None else tensor.name.replace(f".experts.{weight.expert}.", ".experts.")
    return Weight(key + number, None, (tensor,), axis if weight.axis == axis else None, expert=weight.expert)


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
    """Return every A, and every part of a B, of a table."""
    return [w for entry in table for f in entry.factors for w in (f.a, *f.b)]


def in_files(factors: Iterable[Weight]) -> dict[HFTensor, list[tuple[Weight, int]]]:
    """Return the tensors of an adapter's files, each with its parts, as `hf.weights.places` does a model's."""
    found: dict[HFTensor, list[tuple[Weight, int]]] = {}
    for weight in factors:
        found.setdefault(weight.tensors[0].whole, []).append((weight, 0))
    return found
