"""Filling Megatron's model with weights from a folder or a checkpoint, or random ones; each rank only its own part.

`weights` says which tensor goes where, and `shards` reads the files. The hook is registered in
`GPTModelConfig.pre_wrap_hooks`, which Megatron calls when all pipeline chunks of the rank are built and not yet wrapped
for mixed precision or data parallelism.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model
from torch import Tensor

from bft_megatron.errors import UserError
from bft_megatron.hf import hub, joined_experts, prediction, shards
from bft_megatron.hf.draw import generator
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.hf.place import Place
from bft_megatron.hf.tensors import HFTensor, Weight, join
from bft_megatron.hf.torch_dist import Checkpoint, newest_checkpoint
from bft_megatron.hf.weights import places, weights


class Source(Protocol):
    """A reader of Hugging Face tensors: returns indices [start, stop) along an axis, or all of it if axis is None."""

    def __call__(self, tensor: HFTensor, axis: int | None, start: int, stop: int, /) -> Tensor: ...


def weights_hook(folder: Path | None, config: ModelConfig, *, seed: int) -> Callable[[list[GPTModel]], list[GPTModel]]:
    """Return a hook for `GPTModelConfig.pre_wrap_hooks` that fills every parameter of the rank's model chunks.

    Args:
        folder: the model's safetensors, one file or several with an index, or a run's `model/` beside its torch_dist
            checkpoints (`hub.find_model`); None: random weights, the same model in every layout.
        config: the model's configuration.
        seed: seed of the random weights.

    Returns:
        The hook. It issues no collective: each rank reads or draws its own parts, one tensor at a time.

    Raises:
        UserError: by `check_weights`, at once and on every rank; by the hook, if TP does not divide the model.
    """
    source = open_source(folder, config, seed)
    table = {w.path: w for w in weights(config)}
    if config.tied:
        # For a last pipeline stage that is not the first; from here on Megatron keeps the two copies equal.
        table["output_layer.weight"] = table["embedding.word_embeddings.weight"]

    @torch.no_grad()
    def fill(chunks: list[GPTModel]) -> list[GPTModel]:
        tp = parallel_state.get_tensor_model_parallel_world_size()
        if config.kv_heads % tp:
            raise UserError(f"tensor parallelism {tp} does not divide the model's {config.kv_heads} key/value heads")
        for chunk in chunks:
            place = place_of(chunk, config)
            for name, parameter in chunk.named_parameters():
                fill_part(parameter, table[place.path(name)], source)
        return chunks

    return fill


def buffers_hook(folder: Path | None, config: ModelConfig, *, seed: int) -> Callable[[list[Any]], list[Any]]:
    """Return a hook for `GPTModelConfig.post_wrap_hooks` that fills the buffers; arguments as of `weights_hook`.

    Megatron's wrapper for mixed precision rounds buffers to 16 bits, and widens them again: they are filled after it.
    """
    table = {w.path: w for w in weights(config) if w.buffer}
    source = open_source(folder, config, seed) if table else None

    @torch.no_grad()
    def fill(chunks: list[Any]) -> list[Any]:
        for chunk in map(unwrap_model, chunks):
            place = place_of(chunk, config)
            for name, buffer in chunk.named_buffers():
                if source is not None and (weight := table.get(place.path(name))):
                    fill_part(buffer, weight, source)
        return chunks

    return fill


def place_of(chunk: GPTModel, config: ModelConfig) -> Place:
    """Return which layers and experts of the model a pipeline chunk of this rank holds."""
    layers = tuple(layer.layer_number - 1 for layer in chunk.decoder.layers)
    delta_nets = frozenset(filter(config.has_linear_attention, layers))
    if config.experts is None:
        return Place(layers, delta_nets=delta_nets)
    local = config.experts.count // parallel_state.get_expert_model_parallel_world_size()
    first_expert = parallel_state.get_expert_model_parallel_rank() * local
    return Place(layers, frozenset(filter(config.has_experts, layers)), delta_nets, first_expert)


def open_source(folder: Path | None, config: ModelConfig, seed: int) -> Source:
    """Return the reader of the model's tensors that `weights_hook` uses, given the same arguments."""
    if folder is None:
        return _Random(config, seed)
    checkpoints = hub.checkpoints_of(folder)
    if checkpoints:
        return _FromCheckpoint(newest_checkpoint(checkpoints), config)
    return _from_files(folder, config)


def _from_files(folder: Path, config: ModelConfig) -> Source:
    entries = check_weights(folder, config)
    read, places_there = shards.Reader(entries), joined_experts.places_in(entries, config)

    def source(tensor: HFTensor, axis: int | None, start: int, stop: int) -> Tensor:
        there = places_there.get(tensor, tensor)
        return there.read(partial(read, there.name), axis, start, stop)

    return source


def check_weights(folder: Path, config: ModelConfig) -> dict[str, shards.Entry]:
    """Compare the headers of a folder's safetensors with what the model needs, and return them.

    Raises:
        UserError: a tensor is missing, has another shape or a dtype that is not a plain float, or is unknown to the
            model; or a shard is missing or truncated.
    """
    entries = shards.read_headers(folder)
    expected = {t.name: t.shape for t in places(joined_experts.as_in(entries, config))}
    missing = sorted(expected.keys() - entries.keys())
    if missing:
        raise UserError(f"{len(missing)} tensors of {config.architecture} are missing, {_some(missing)}", str(folder))
    for name, shape in expected.items():
        entry = entries[name]
        if entry.shape != shape:
            raise UserError(f"{name} has the shape {entry.shape}, by config.json it is {shape}", str(entry.file))
        if entry.dtype not in shards.DTYPES:
            raise UserError(
                f"{name} has the dtype {entry.dtype}; can be read: {', '.join(shards.DTYPES)}", str(entry.file)
            )
    unknown = sorted(name for name in entries.keys() - expected.keys() if not _is_redundant(name, config))
    if unknown:
        # An unknown tensor may be a bias or a norm that the original model computes with and this one does not.
        raise UserError(
            f"{len(unknown)} tensors that {config.architecture} does not have, {_some(unknown)}", str(folder)
        )
    return entries


def _is_redundant(name: str, config: ModelConfig) -> bool:
    """Return whether a tensor can be ignored: of old files, of a tied output layer, of multi-token prediction."""
    tied = config.tied and name == "lm_head.weight"
    return tied or name.endswith(".rotary_emb.inv_freq") or prediction.is_predicting(name, config)


def _some(names: list[str]) -> str:
    return f"among them {', '.join(names[:3])}" if len(names) > 3 else ", ".join(names)


def fill_part(parameter: Tensor, weight: Weight, source: Source) -> None:
    """Copy this TP rank's part of a weight into the parameter, converting dtype and device."""
    tp, rank = tensor_parallel_of(weight)
    if weight.padded:
        rows = parameter.shape[0]
        (tensor,) = weight.tensors
        own = source(tensor, 0, min(rank * rows, tensor.shape[0]), min((rank + 1) * rows, tensor.shape[0]))
        parameter[: len(own)] = own
        parameter[len(own) :] = 0
        return
    parts = []
    for tensor in weight.tensors:
        n = tensor.shape[weight.axis or 0] // tp
        parts.append(source(tensor, weight.axis, rank * n, (rank + 1) * n))
    value = join(parts, max(weight.blocks // tp, 1))
    assert value.shape == parameter.shape, f"{weight.path}: {tuple(value.shape)} for {tuple(parameter.shape)}"
    parameter.copy_(value)


def tensor_parallel_of(weight: Weight) -> tuple[int, int]:
    """Return the number of ranks that share a weight, and this rank's number among them."""
    if weight.axis is None:
        return 1, 0
    if weight.expert is not None:
        return (
            parallel_state.get_expert_tensor_parallel_world_size(),
            parallel_state.get_expert_tensor_parallel_rank(),
        )
    return parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()


class _FromCheckpoint:
    """A reader of a torch_dist checkpoint of any layout; it loads a whole tensor, then returns the part."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self._checkpoint, self._places = checkpoint, places(config)
        self._weights = {t: (w, i) for w in weights(config) for i, t in enumerate(w.tensors)}
        for weight in weights(config):
            checkpoint.check_shape(weight)

    def __call__(self, tensor: HFTensor, axis: int | None, start: int, stop: int) -> Tensor:
        if tensor in self._weights:
            whole = self._checkpoint.read_tensor(*self._weights[tensor])
        else:
            whole = self._checkpoint.read_whole(tensor, self._places[tensor])
        return whole if axis is None else whole.narrow(axis, start, stop - start)


class _Random:
    """A source of random weights: draws a whole tensor from a generator seeded by its name and returns the part."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._buffers = {t.name for w in weights(config) if w.buffer for t in w.tensors}
        self._std, self._seed, self._zero_centred = config.initializer_range, seed, config.zero_centred_norms
        self._draw_joined = lru_cache(maxsize=2)(self._draw)  # each expert's rows are asked for, one after the other

    def __call__(self, tensor: HFTensor, axis: int | None, start: int, stop: int) -> Tensor:
        joined = tensor.rows is not None and tensor.rows.lead is not None
        whole = (self._draw_joined if joined else self._draw)(tensor.whole)
        return tensor.read(lambda index: whole[index], axis, start, stop)

    def _draw(self, tensor: HFTensor) -> Tensor:
        """Draw a tensor as transformers initialises it."""
        name, shape, random = tensor.name, tensor.shape, generator(self._seed, tensor.name)
        if name.endswith("linear_attn.A_log"):
            return torch.empty(shape).uniform_(0.01, 16, generator=random).log_()
        if name.endswith("linear_attn.conv1d.weight"):
            bound = 1 / math.sqrt(shape[-1])
            return torch.empty(shape).uniform_(-bound, bound, generator=random)
        if len(shape) == 1 and name not in self._buffers:
            delta_net = name.endswith((".dt_bias", "linear_attn.norm.weight"))
            zeros = name.endswith(".bias") or (self._zero_centred and not delta_net)
            return torch.zeros(shape) if zeros else torch.ones(shape)
        return torch.randn(shape, generator=random) * self._std
