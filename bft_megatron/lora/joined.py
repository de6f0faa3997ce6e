"""The adapters of a layer's experts as two of all of them, in the files of models of which `peft` 0.21 reads no others.

transformers 5 has the experts' matrices in two parameters, and `peft` adapts these: gate and up by one adapter of twice
the rank. It translates an expert's own factors only where the decoder is the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bft_megatron.hf import shards
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.hf.tensors import HFTensor, Weight

ARCHITECTURES = {"Qwen3_5MoeForConditionalGeneration"}


@dataclass(frozen=True)
class Place:
    """The place of an expert's factor in that of all experts of its layer."""

    whole: HFTensor
    """A: [experts x matrices x rank, in]. B: [matrices x out, matrices x rank x experts]."""
    experts: int
    expert: int
    matrices: tuple[str, ...]
    """The matrices that the adapter joins: gate and up, or down alone."""
    matrix: int
    """Number of the factor's own matrix among them."""

    @property
    def is_b(self) -> bool:
        """Return whether the factor is a B."""
        return self.whole.name.endswith(".lora_B.weight")

    def of(self, whole: Tensor) -> Tensor:
        """Return the factor in that of all experts, a view."""
        if self.is_b:
            return self.block(whole, self.matrix).unflatten(1, (-1, self.experts))[..., self.expert]
        return whole.unflatten(0, (self.experts, len(self.matrices), -1))[self.expert, self.matrix]

    def block(self, whole: Tensor, ranks: int) -> Tensor:
        """Return the rows that a B has for the own matrix, and the columns for all experts' ranks of one matrix."""
        rows, columns = (n // len(self.matrices) for n in self.whole.shape)
        return whole.narrow(0, self.matrix * rows, rows).narrow(1, ranks * columns, columns)

    def is_mixed(self, whole: Tensor) -> bool:
        """Return whether the own matrix has a part in the ranks of another: then it has no factors of its own."""
        others = [i for i in range(len(self.matrices)) if i != self.matrix]
        return self.is_b and any(bool(self.block(whole, i).any()) for i in others)


def places(factors: Iterable[Weight], config: ModelConfig) -> dict[HFTensor, Place]:
    """Return the place of each factor of an expert, for models whose adapters are joined; others have none."""
    if config.architecture not in ARCHITECTURES or config.experts is None:
        return {}
    own = [w for w in factors if w.expert is not None]
    return {w.tensors[0]: _place(w.tensors[0], w.expert, config.experts.count) for w in own if w.expert is not None}


def _place(factor: HFTensor, expert: int, experts: int) -> Place:
    layer, _, name = factor.name.partition(f".experts.{expert}.")
    module, kind, _ = name.split(".")
    matrices = ("down_proj",) if module == "down_proj" else ("gate_proj", "up_proj")
    n, (rows, columns) = len(matrices), factor.shape
    shape = (experts * n * rows, columns) if kind == "lora_A" else (n * rows, n * columns * experts)
    at = "experts" if n == 1 else "experts.base_layer"
    return Place(HFTensor(f"{layer}.{at}.{kind}.weight", shape), experts, expert, matrices, matrices.index(module))


def join(outputs: dict[HFTensor, shards.Output], there: dict[HFTensor, Place]) -> list[shards.Output]:
    """Return the outputs of an adapter's factors, with those that have a place joined; each is read when written."""
    found: dict[HFTensor, shards.Output] = {}
    parts: dict[HFTensor, list[tuple[Place, shards.Output]]] = {}
    for tensor, output in outputs.items():
        if tensor not in there:
            found[tensor] = output
            continue
        whole = there[tensor].whole
        own = parts.setdefault(whole, [])
        own.append((there[tensor], output))
        found[whole] = replace(output, name=whole.name, shape=whole.shape, read=partial(_read, whole, own))
    return list(found.values())


def _read(whole: HFTensor, parts: list[tuple[Place, shards.Output]]) -> Tensor:
    out = torch.zeros(whole.shape, dtype=parts[0][1].dtype)
    for place, output in parts:
        place.of(out).copy_(output.read())
    return out
