"""Adapters on Megatron's column- and row-parallel linear layers: submodules of the layers, applied by a forward hook.

A hook in `GPTModelConfig.pre_wrap_hooks`, after the one that fills the weights, freezes the model, gives each linear
layer named by `factors` an `Adapter` as its child `lora`, and reduces the chunk's state dict to the adapters. Layers
are found by name, whatever their class; the class must get an already normalised input, which `unfused_spec` ensures on
a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch import Tensor
from torch.nn.functional import linear

from bft_megatron.hf.load import Source, fill_part, place_of, tensor_parallel_of
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.hf.weights import Weight
from bft_megatron.lora.factors import Adapted, Fresh, adapted, scale, settings_of
from bft_megatron.lora.peft import AdapterFolder
from bft_megatron.recipe.schema import LoraSettings, Recipe
from bft_megatron.upstream import model_chunk


def install(model: Any, recipe: Recipe, config: ModelConfig, *, torch_layers: bool) -> None:
    """Make a `GPTModelConfig` build the adapters of the recipe's `lora:`, after the hook that fills the weights.

    Raises:
        UserError: `lora.adapter` is not an adapter folder, or does not fit the model and the recipe.
    """
    settings = settings_of(recipe)
    if settings.adapter is None:
        source: Source = Fresh(adapted(config, settings), recipe.train.seed)
    else:
        source = AdapterFolder(Path(settings.adapter), config, settings)
    if not torch_layers:
        model.transformer_layer_spec = unfused_spec
    model.pre_wrap_hooks.append(lora_hook(config, settings, source))


def lora_hook(
    config: ModelConfig, settings: LoraSettings, source: Source
) -> Callable[[list[GPTModel]], list[GPTModel]]:
    """Return a hook for `GPTModelConfig.pre_wrap_hooks` that freezes the model and adds adapters to it.

    Args:
        config: the model's configuration.
        settings: the recipe's `lora:`.
        source: the factors' initial values, by their names in `factors`.

    Returns:
        The hook; it issues no collective.
    """
    table = {entry.weight.path: entry for entry in adapted(config, settings)}
    experts = config.experts.count if config.experts else 0

    def adapt(chunks: list[GPTModel]) -> list[GPTModel]:
        for chunk in chunks:
            chunk.requires_grad_(False)
            place = place_of(chunk, config)
            for name, module in list(chunk.named_modules()):
                own = [(table.get(place.path(f"{name}.{n}")), p) for n, p in module.named_parameters(recurse=False)]
                made = [_adapter(e, settings, chunk.config.sequence_parallel, p) for e, p in own if e is not None]
                if made:
                    _attach(module, made, source)
            if chunk.pre_process:
                # Full recompute silently drops the gradients of a layer whose input needs none, here the first layer.
                chunk.embedding.register_forward_hook(lambda _, __, out: out.requires_grad_())
            model_chunk.save_and_load_instead(
                chunk, partial(_sharded_state_dict, chunk, experts), partial(_load_state_dict, chunk)
            )
        return chunks

    return adapt


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
        self.modules_adapted = [None if f is None else f.module for f in entry.factors]
        self.weights: dict[str, Weight] = {}
        for f in entry.factors:
            if f is not None:
                # Registered on this module, because DDP waits for gathered parameters by the module that is called.
                self._add(f"{f.module}_a", f.a, like)
                self._add(f"{f.module}_b", f.b, like)

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
        factors = [name for name in self.modules_adapted if name]
        z = linear(x, torch.cat([self._factor(f"{name}_a") for name in factors]))
        z = self.scale * self._across_ranks(z)  # [s, b, matrices * rank]
        parts = dict(zip(factors, z.split(self.rank, -1), strict=True))
        out = [
            linear(parts[name], self._factor(f"{name}_b")) if name else z.new_zeros(*z.shape[:-1], rows)
            for name, rows in zip(self.modules_adapted, self.rows, strict=True)
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


def adapters(chunk: torch.nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Yield each adapter of a chunk and its name there."""
    for name, module in chunk.named_modules():
        if isinstance(module, Adapter):
            yield name, module


def unfused_spec(config: Any, vp_stage: int | None = None) -> Any:
    """Return Transformer Engine's spec with separate norms, for `GPTModelConfig.transformer_layer_spec`.

    A norm fused into the linear layer would leave the adapter with an input that is not normalised. Weights have the
    same names in a checkpoint as with the local and the fused spec.
    """
    from megatron.training.models.gpt import default_layer_spec

    spec = default_layer_spec(config, vp_stage)
    for layer in getattr(spec, "layer_specs", [spec]):  # a mixture's spec is a block's
        _unfuse(layer.submodules)
    return spec


def _unfuse(parts: Any) -> None:
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.mlp import MLPSubmodules

    backend, network = TESpecProvider(), parts.mlp.keywords["submodules"]
    names = get_gpt_layer_local_spec(normalization="RMSNorm").submodules.sharded_state_dict_keys_map
    parts.input_layernorm = parts.pre_mlp_layernorm = backend.layer_norm(has_residual=True)
    parts.self_attention.submodules.linear_qkv = backend.column_parallel_linear()
    if isinstance(network, MLPSubmodules):
        network.linear_fc1 = backend.column_parallel_linear()
    else:  # the norm before a router is a module of its own in the fused spec too
        names = {k: v for k, v in names.items() if k != "pre_mlp_layernorm."}
    parts.sharded_state_dict_keys_map = names


def _adapter(entry: Adapted, settings: LoraSettings, sequence_parallel: bool, like: Tensor) -> Adapter:
    kind = Adapter if entry.weight.expert is None else ExpertAdapter
    return kind(entry, settings, sequence_parallel, like)


def _attach(layer: torch.nn.Module, made: list[Adapter], source: Source) -> None:
    assert not hasattr(layer, "layer_norm_weight"), "the layer norms its own input, which its adapter would not see"
    with torch.no_grad():
        for adapter in made:
            for name, weight in adapter.weights.items():
                fill_part(adapter.get_parameter(name), weight, source)
    layer.lora = made[0] if hasattr(layer, "weight") else GroupedAdapters(made)
    layer.register_forward_hook(lambda module, args, out: (out[0] + module.lora(*args), *out[1:]))


def _sharded_state_dict(
    chunk: GPTModel,
    experts: int,
    prefix: str = "",
    sharded_offsets: tuple[Any, ...] = (),
    metadata: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the adapters by Hugging Face name; the frozen weights are loaded from the base model at every start.

    Args:
        experts: number of experts of a layer.
    """
    tensors = {}
    for path, adapter in adapters(chunk):
        for name, weight in adapter.weights.items():
            tensors[f"{prefix}{path}.{name}"] = _sharded_tensor(adapter.get_parameter(name), weight, experts)
    return tensors


def _sharded_tensor(parameter: torch.nn.Parameter, weight: Weight, experts: int) -> Any:
    if weight.expert is None:
        groups = {
            "tp_group": parallel_state.get_tensor_model_parallel_group(),
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
    else:
        groups = {
            "tp_group": parallel_state.get_expert_tensor_parallel_group(),
            "dp_cp_group": parallel_state.get_expert_data_parallel_group(),
        }
        groups["prepend_offsets"] = ((0, weight.expert, experts),)
    if weight.axis is None:
        return make_sharded_tensor_for_checkpoint(parameter, weight.name, **groups)
    return make_tp_sharded_tensor_for_checkpoint(parameter, weight.name, weight.axis, **groups)


@torch.no_grad()
def _load_state_dict(chunk: GPTModel, state: dict[str, Tensor], strict: bool = True) -> None:
    """Load the adapters of a checkpoint, always strictly, whatever `strict` is."""
    own = {
        f"{path}.{name}": adapter.get_parameter(name) for path, adapter in adapters(chunk) for name in adapter.weights
    }
    if own.keys() != state.keys():
        raise RuntimeError(f"the checkpoint's adapters are not the model's: {sorted(own.keys() ^ state.keys())}")
    for name, parameter in own.items():
        parameter.copy_(state[name])
