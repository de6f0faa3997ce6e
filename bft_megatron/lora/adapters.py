"""Adapters on Megatron's column- and row-parallel linear layers: submodules of the layers, applied by a forward hook.

A hook in `GPTModelConfig.pre_wrap_hooks`, after the one that fills the weights, freezes the model, gives each linear
layer named by `factors` an `Adapter` as its child `lora`, and reduces the chunk's state dict to the adapters. Layers
are found by name, whatever their class; the class must get an already normalised input, which `unfused_spec` ensures on
a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from bft_megatron.hf.load import Source, fill_part, place_of
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.hf.tensors import Weight
from bft_megatron.lora.factors import Fresh, adapted, settings_of
from bft_megatron.lora.layers import Adapter, GroupedAdapters, adapter_of, adapters
from bft_megatron.lora.peft import AdapterFolder
from bft_megatron.lora.unfused import unfused_spec
from bft_megatron.recipe.schema import LoraSettings, Recipe
from bft_megatron.upstream import model_chunk


def install(model: Any, recipe: Recipe, config: ModelConfig, *, torch_layers: bool) -> None:
    """Make a `GPTModelConfig` build the adapters of the recipe's `lora:`, after the hook that fills the weights.

    Raises:
        UserError: `lora.adapter` is not an adapter folder, or does not fit the model and the recipe.
    """
    settings = settings_of(recipe)
    if settings.adapter is None:
        source: Source = Fresh(recipe.train.seed)
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
                made = [adapter_of(e, settings, chunk.config.sequence_parallel, p) for e, p in own if e is not None]
                if made:
                    _fill(made, source)
                    attach(module, made)
            if chunk.pre_process:
                # Full recompute silently drops the gradients of a layer whose input needs none, here the first layer.
                chunk.embedding.register_forward_hook(lambda _, __, out: out.requires_grad_())
            model_chunk.save_and_load_instead(
                chunk, partial(_sharded_state_dict, chunk, experts), partial(_load_state_dict, chunk)
            )
        return chunks

    return adapt


@torch.no_grad()
def _fill(made: list[Adapter], source: Source) -> None:
    for adapter in made:
        for name, weight in adapter.weights.items():
            fill_part(adapter.get_parameter(name), weight, source)


def attach(layer: torch.nn.Module, made: list[Adapter]) -> None:
    """Make adapters the child `lora` of a linear layer, or of one of experts, and add their outputs to the layer's."""
    assert not hasattr(layer, "layer_norm_weight"), "the layer norms its own input, which its adapter would not see"
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
