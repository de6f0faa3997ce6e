"""A torch_dist checkpoint of any layout as a Hugging Face model: one process, no model built, one tensor in memory.

Reads the checkpoint by its own index and writes each tensor as it comes, so 70B needs some GiB, not 140. Which part of
which parameter a tensor is, is in `weights`; the files are in `shards`. A checkpoint's index is a pickle, and reading
one runs what it holds: export your own checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from bft_megatron.errors import UserError
from bft_megatron.hf import shards
from bft_megatron.hf.architectures import companions, read_config
from bft_megatron.hf.weights import Weight, part, weights

_BROKEN = (OSError, EOFError, ValueError, RuntimeError, pickle.UnpicklingError)
"""What torch raises on a damaged file of a checkpoint."""


def export(
    checkpoints: Path,
    out: Path,
    hf_folder: Path,
    *,
    iteration: int | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: float = 5e9,
) -> None:
    """Write a checkpoint as a folder that transformers and vLLM read; it appears under its name only when it is whole.

    Args:
        checkpoints: a run's checkpoints, `iter_*` folders and the file that names the newest.
        out: folder to write; must not hold anything yet.
        hf_folder: config.json, generation config, tokenizer and template of the model, copied as they are.
        iteration: of the checkpoint; None: the newest.
        dtype: of the written weights (config.json's is changed with it); None: as they are in the checkpoint.
        shard_bytes: largest file of weights, but for a tensor that is larger by itself.

    Raises:
        UserError: no such checkpoint, or one of another model, or a missing or broken file in it; `out` is in use or
            cannot be written.
    """
    refuse_used(out)
    checkpoint = newest_checkpoint(checkpoints, iteration)
    table = weights(read_config(hf_folder))
    tensors = [_output(checkpoint, weight, i, dtype) for weight in table for i in range(len(weight.tensors))]
    write_model(out, hf_folder, tensors, shard_bytes)


def refuse_used(out: Path) -> None:
    """Raise UserError where the folder to write holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("is not empty; choose another folder, or remove it", str(out))


def write_model(out: Path, hf_folder: Path, tensors: list[shards.Output], shard_bytes: float = 5e9) -> None:
    """Write a model folder of these tensors, each read when its turn comes; the rest as in `export`."""
    with written_whole(out) as partial:
        _copy_companions(hf_folder, partial, tensors[0].dtype)
        _write_shards(partial, tensors, shard_bytes)


@contextlib.contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which gets its name where no error comes, and is removed where one does.

    Raises:
        UserError: it cannot be written.
    """
    partial = out.absolute().with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(out)
    except OSError as e:
        raise UserError(f"cannot write the model: {e.strerror}", str(out)) from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Checkpoint:
    """Reads rows of parameters from a torch_dist checkpoint, whatever layout wrote it.

    Megatron stores a parameter of all layers as one tensor with a leading layer dimension
    (`decoder.layers.mlp.linear_fc1.weight`), or, where layers differ from each other, one by one
    (`decoder.layers.7.mlp.linear_fc1.weight`). Either is read slice by slice; torch then loads the stored chunks that
    the slice touches, one at a time: a layer's part of one tensor-parallel rank.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = FileSystemReader(folder)
        try:
            self._metadata = self._reader.read_metadata()
        except _BROKEN as e:
            raise UserError(f"not a whole checkpoint, cannot read its .metadata: {e}", str(folder)) from e
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def dtype(self, weight: Weight) -> torch.dtype:
        return self._find(weight)[1].properties.dtype

    def shape(self, weight: Weight) -> tuple[int, ...]:
        """Of the whole parameter, over all TP ranks; the vocabulary with Megatron's padding."""
        key, stored = self._find(weight)
        return tuple(stored.size)[1:] if self._stacked(weight, key) else tuple(stored.size)

    def read(self, weight: Weight, first: int, rows: int) -> Tensor:
        """Rows first to first + rows of the whole parameter.

        Raises:
            UserError: a file of the checkpoint is missing or broken, or a part of the tensor in none of them.
        """
        key, stored = self._find(weight)
        lead = [weight.layer] if self._stacked(weight, key) else []
        size = [rows, *self.shape(weight)[1:]]
        offsets = [*lead, first, *(0 for _ in size[1:])]
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size([1] * len(lead) + size))
        items = create_read_items_for_chunk_list(key, stored, [wanted])
        out = torch.empty(wanted.sizes, dtype=stored.properties.dtype)
        if sum(torch.Size(item.lengths).numel() for item in items) != out.numel():
            raise UserError(f"a part of {weight.path} is missing", str(self.folder))
        try:
            self._reader.read_data(LoadPlan(items), _Into(out)).wait()
        except _BROKEN as e:
            raise UserError(f"cannot read {weight.path}, a file is missing or broken: {e}", str(self.folder)) from e
        return out.view(size)

    def read_tensor(self, weight: Weight, index: int) -> Tensor:
        """The Hugging Face tensor number `index` of a parameter. Raises UserError as `read`."""
        rows = [t.shape[0] for t in weight.tensors]
        if weight.blocks == 1:  # its rows lie together; the vocabulary's padding is left behind
            return self.read(weight, sum(rows[:index]), rows[index])
        return part(weight, index, self.read(weight, 0, sum(rows)))

    def check_shape(self, weight: Weight) -> None:
        """Raise a UserError where the checkpoint's parameter is not the size that config.json says."""
        rows = sum(t.shape[0] for t in weight.tensors)
        shape, needed = self.shape(weight), (rows, *weight.tensors[0].shape[1:])
        fits = shape[0] >= rows and shape[1:] == needed[1:] if weight.padded else shape == needed
        if not fits:
            raise UserError(f"{weight.path} is {shape} in the checkpoint, {needed} by config.json", str(self.folder))

    def _find(self, weight: Weight) -> tuple[str, TensorStorageMetadata]:
        stacked = weight.name if weight.layer is None else f"decoder.layers.{weight.name}"
        for key in (stacked, weight.path):
            stored = self._metadata.state_dict_metadata.get(key)
            if isinstance(stored, TensorStorageMetadata):
                return key, stored
        raise UserError(f"has no {weight.path}: it is a checkpoint of another model", str(self.folder))

    def _stacked(self, weight: Weight, key: str) -> bool:
        return weight.layer is not None and key != weight.path


class _Into:
    """The smallest of torch's load planners: every piece that was read lands in one tensor."""

    def __init__(self, out: Tensor) -> None:
        self._out = out

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        return self._out[tuple(slice(o, o + n) for o, n in zip(item.dest_offsets, item.lengths, strict=True))]

    def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None: ...


def _output(checkpoint: Checkpoint, weight: Weight, index: int, dtype: torch.dtype | None) -> shards.Output:
    """Tensor number `index` of a weight, read when it is written."""
    tensor = weight.tensors[index]
    checkpoint.check_shape(weight)
    dtype = dtype or checkpoint.dtype(weight)
    return shards.Output(tensor.name, dtype, tensor.shape, lambda: checkpoint.read_tensor(weight, index))


def newest_checkpoint(checkpoints: Path, iteration: int | None = None) -> Checkpoint:
    """The newest checkpoint of a folder of them, or that of an iteration.

    Raises:
        UserError: there is none, or it was never finished.
    """
    if iteration is None:
        tracker = checkpoints / "latest_checkpointed_iteration.txt"
        try:
            iteration = int(tracker.read_text())
        except OSError:
            raise UserError("holds no checkpoint", str(checkpoints)) from None
        except ValueError:
            raise UserError("should hold the number of the newest checkpoint", str(tracker)) from None
    folder = checkpoints / f"iter_{iteration:07d}"
    if not (folder / "metadata.json").exists():  # Megatron writes it last
        raise UserError("no such checkpoint, or one that was never finished", str(folder))
    return Checkpoint(folder)


def _copy_companions(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy what belongs to a model beside its weights, with the weights' dtype in config.json."""
    for file in companions(source):
        shutil.copyfile(file, target / file.name)
    config = json.loads((source / "config.json").read_text())
    key, name = "torch_dtype" if "torch_dtype" in config else "dtype", str(dtype).removeprefix("torch.")
    if config.get(key) != name:
        (target / "config.json").write_text(json.dumps(config | {key: name}, indent=2) + "\n")


def _write_shards(folder: Path, tensors: list[shards.Output], shard_bytes: float) -> None:
    """Weights as one file, or as many with an index."""
    groups: list[list[shards.Output]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(t.bytes for t in groups[-1]) + tensor.bytes > shard_bytes:
            groups.append([])
        groups[-1].append(tensor)
    total, one = sum(t.bytes for t in tensors), len(groups) == 1
    index: dict[str, str] = {}
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("weights", total=total)
        for i, group in enumerate(groups):
            name = "model.safetensors" if one else f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
            shards.write(folder / name, group, lambda written: bar.advance(task, written))
            index |= {t.name: name for t in group}
    if not one:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2, sort_keys=True)
        (folder / shards.INDEX).write_text(text + "\n")
