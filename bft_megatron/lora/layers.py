"""The modules that compute adapters, sharded like the linear layer that each belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor
from torch.nn.functional import linear

from bft_megatron.hf.load import tensor_parallel_of
from bft_megatron.hf.tensors import Weight
from bft_megatron.lora.factors import Adapted, scale
from bft_megatron.recipe.schema import LoraSettings


class Adapter(torch.nn.Module):
    """scale * B A x for the matrices of one parallel linear layer, each with its own factors, in the layer's row order.

    One factor of each pair is sharded over TP and the other is whole on every rank: in a column-parallel layer B is
    sharded, in a row-parallel one A. Under sequence parallelism the gradient of a whole factor covers only the rank's
    part of the sequence; it is marked so, and Megatron's `finalize_model_grads` sums it over TP.

    Args:
        entry: the matrices and the shapes of the factors.
        settings: the recipe's `lora:`.
        sequence_parallel: whether the layer's unsharded side is split along the sequence.
        like: the layer's own weight, for dtype and device.
    """

    def __init__(self, entry: Adapted, settings: LoraSettings, sequence_parallel: bool, like: Tensor) -> None:
        super().__init__()
        tp, _ = tensor_parallel_of(entry.weight)
        self.column = entry.weight.axis == 0
        self.sequence_parallel = sequence_parallel
        self.rank, self.scale = settings.rank, scale(settings)
        self.blocks = max(entry.weight.blocks // tp, 1)
        self.rows = [t.shape[0] // (tp if self.column else 1) for t in entry.weight.tensors]
        self.modules_adapted = [f.module for f in entry.factors]
        self.weights: dict[str, Weight] = {}
        names: dict[Weight, str] = {}
        for f in entry.factors:
            # Registered on this module, because DDP waits for gathered parameters by the module that is called.
            self._add(f"{f.module}_a", f.a, like)
            for i, b in enumerate(f.b):
                names[b] = f"{f.module}_b" if len(f.b) == 1 else f"{f.module}_b{i}"
                self._add(names[b], b, like)
        self.parts = [None if part is None else (part[0].module, names[part[1]]) for part in entry.parts]

    def _add(self, name: str, weight: Weight, like: Tensor) -> None:
        (tensor,) = weight.tensors
        shape = list(tensor.shape)
        if weight.axis is not None:
            shape[weight.axis] //= tensor_parallel_of(weight)[0]
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device))
        self._mark(parameter, weight, like)
        if weight.axis is not None:  # counted in the gradient norm on every TP rank
            set_tensor_model_parallel_attributes(parameter, True, weight.axis, 1)
        self.register_parameter(name, parameter)
        self.weights[name] = weight

    def _mark(self, parameter: Any, weight: Weight, like: Tensor) -> None:
        """Set the mark by which Megatron chooses the ranks that sum a factor's gradient."""
        parameter.sequence_parallel = self.sequence_parallel and weight.axis is None

    def forward(self, x: Tensor) -> Tensor:
        """Return the addition to the layer's output, [s, b, out], for its input x, [s, b, in], both sharded as there.

        Collectives over TP, of `rank` columns for each matrix. Forward: column-parallel, an all-gather with sequence
        parallelism, none without; row-parallel, a reduce-scatter with it, an all-reduce without. Backward: the
        transposed ones.
        """
        z = linear(x, torch.cat([self._factor(f"{name}_a") for name in self.modules_adapted]))
        z = self.scale * self._across_ranks(z)  # [s, b, matrices * rank]
        of_module = dict(zip(self.modules_adapted, z.split(self.rank, -1), strict=True))
        out = [
            linear(of_module[part[0]], self._factor(part[1])) if part else z.new_zeros(*z.shape[:-1], rows)
            for part, rows in zip(self.parts, self.rows, strict=True)
        ]
        if len(out) == 1:
            return out[0]
        return torch.cat([y.unflatten(-1, (self.blocks, -1)) for y in out], -1).flatten(-2)  # `weights.join`, last axis

    def _factor(self, name: str) -> Tensor:
        return self.get_parameter(name)

    def _across_ranks(self, z: Tensor) -> Tensor:
        if self.column and self.sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(z)
        if self.column:
            return mappings.copy_to_tensor_model_parallel_region(z)  # backward: all-reduce over TP
        if self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(z)
        return mappings.reduce_from_tensor_model_parallel_region(z)


class ExpertAdapter(Adapter):
    """An `Adapter` of one expert, whose sharded factors are sharded over expert-TP.

    The token dispatcher gives all ranks of an expert's matrices the same tokens and sums their outputs, so the
    activations need no collective. The gradient of a whole factor covers only the rank's part of the matrix; it is
    all-reduced over expert-TP in the backward pass. Over which ranks of data parallelism Megatron sums the gradients is
    a mark on the expert's own weight, which the factors get too.
    """

    def _mark(self, parameter: Any, weight: Weight, like: Tensor) -> None:
        parameter.allreduce = getattr(like, "allreduce", True)

    def _factor(self, name: str) -> Tensor:
        factor = self.get_parameter(name)
        if self.weights[name].axis is not None:
            return factor
        group = parallel_state.get_expert_tensor_parallel_group()
        return mappings.copy_to_tensor_model_parallel_region(factor, group=group)

    def _across_ranks(self, z: Tensor) -> Tensor:
        return z


class GroupedAdapters(torch.nn.ModuleList):
    """The adapters of a layer that multiplies by the matrices of all of a rank's experts at once."""

    def forward(self, x: Tensor, tokens: list[int]) -> Tensor:
        """Return the addition to the layer's output, [t, out], for its input [t, in].

        Args:
            tokens: the number of tokens of each expert, whose rows follow each other.
        """
        return torch.cat([adapter(part) for adapter, part in zip(self, x.split(tokens), strict=True)])


def adapter_of(entry: Adapted, settings: LoraSettings, sequence_parallel: bool, like: Tensor) -> Adapter:
    """Return the adapter of a parameter; for the arguments see `Adapter`."""
    kind = Adapter if entry.weight.expert is None else ExpertAdapter
    return kind(entry, settings, sequence_parallel, like)


def adapters(chunk: torch.nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Yield each adapter of a chunk and its name there."""
    for name, module in chunk.named_modules():
        if isinstance(module, Adapter):
            yield name, module
