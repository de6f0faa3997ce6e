"""Reading Megatron's torch_dist checkpoints by their index: any rows of any parameter, whatever layout wrote them.

Needs no process group and no model, and holds one tensor in memory. Nothing in a checkpoint is executed: its index is a
pickle, from which only the classes of an index are accepted; torch reads its records as tensors only.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from bft_megatron.errors import UserError
from bft_megatron.hf import hub
from bft_megatron.hf.record import crc_fault
from bft_megatron.hf.seal import SEAL, read_seal, sealed_fault
from bft_megatron.hf.tensors import HFTensor, Weight, part


class Checkpoint:
    """A torch_dist checkpoint, whatever layout wrote it, from which rows of parameters are read.

    Megatron stores a parameter of all layers as one tensor with a leading layer dimension
    (`decoder.layers.mlp.linear_fc1.weight`) or, if layers differ from each other, one by one
    (`decoder.layers.7.mlp.linear_fc1.weight`). The experts of a layer are one tensor too, with an expert dimension
    (`decoder.layers.mlp.experts.experts.linear_fc1.weight`). All are read slice by slice; torch loads the stored chunks
    that a slice touches, one at a time; a chunk is one layer's or expert's part on one tensor-parallel rank.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader, self._whole = FileSystemReader(folder), set[tuple[str, int, int]]()
        _check_seal(folder)
        with _refusing("not a whole checkpoint, cannot read its .metadata", folder):
            self._metadata = read_index(folder / ".metadata")
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    @property
    def identity(self) -> str:
        """A string that changes whenever another checkpoint is saved, even under the same name."""
        index = self.folder / ".metadata"
        return f"{index.absolute()} {index.stat().st_size} {index.stat().st_mtime_ns}"

    def dtype(self, weight: Weight) -> torch.dtype:
        """Return the dtype that a parameter is stored in."""
        return self._find(weight.stored[0])[1].properties.dtype

    def shape(self, weight: Weight) -> tuple[int, ...]:
        """Return the shape of the whole parameter, over all TP ranks; a vocabulary includes Megatron's padding."""
        key, stored = self._find(weight)
        return tuple(stored.size)[len(_lead(weight, key)) :]

    def read(self, weight: Weight, first: int, rows: int) -> Tensor:
        """Read rows [first, first + rows) of the whole parameter.

        Raises:
            UserError: a file of the checkpoint is missing or broken, or no file has a part of the tensor.
        """
        key, stored = self._find(weight)
        lead = _lead(weight, key)
        size = [rows, *self.shape(weight)[1:]]
        offsets = [*lead, first, *(0 for _ in size[1:])]
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size([1] * len(lead) + size))
        items = create_read_items_for_chunk_list(key, stored, [wanted])
        out = torch.empty(wanted.sizes, dtype=stored.properties.dtype)
        if sum(torch.Size(item.lengths).numel() for item in items) != out.numel():
            raise UserError(f"a part of {weight.path} is missing", str(self.folder))
        with _refusing(f"cannot read {weight.path}, a file is missing or broken", self.folder):
            self._check(items)
            self._reader.read_data(LoadPlan(items), _Into(out)).wait()
        return out.view(size)

    def _check(self, items: list[ReadItem]) -> None:
        """Raise ValueError if a record that is read for the first time does not match its CRC-32."""
        places = (self._reader.storage_data[item.storage_index] for item in items)
        for file, *record in {(p.relative_path, p.offset, p.length) for p in places} - self._whole:
            if fault := crc_fault(self.folder / file, *record):
                raise ValueError(fault)
            self._whole.add((file, *record))

    def read_tensor(self, weight: Weight, index: int) -> Tensor:
        """Return the Hugging Face tensor number `index` of a parameter. Raises UserError as `read`."""
        if weight.sections:
            return self.read_tensor(weight.stored[index], 0)
        rows = [t.shape[0] for t in weight.tensors]
        if weight.blocks == 1:  # its rows are contiguous; the vocabulary's padding is left out
            return self.read(weight, sum(rows[:index]), rows[index])
        return part(weight, index, self.read(weight, 0, sum(rows)))

    def read_whole(self, tensor: HFTensor, parts: list[tuple[Weight, int]]) -> Tensor:
        """Return a tensor of the files, put together from the parts that it has in parameters.

        Raises:
            UserError: as `read`.
        """
        if parts[0][0].tensors[parts[0][1]] == tensor:
            return self.read_tensor(*parts[0])
        out = torch.empty(tensor.shape, dtype=self.dtype(parts[0][0]))
        for weight, index in parts:
            weight.tensors[index].put(self.read_tensor(weight, index), out)
        return out

    def check_shape(self, weight: Weight) -> None:
        """Raise UserError if the shape of the checkpoint's parameter is not the one by config.json."""
        for stored in weight.stored:
            self._check_shape(stored)

    def _check_shape(self, weight: Weight) -> None:
        rows = sum(t.shape[0] for t in weight.tensors)
        shape, needed = self.shape(weight), (rows, *weight.tensors[0].shape[1:])
        fits = shape[0] >= rows and shape[1:] == needed[1:] if weight.padded else shape == needed
        if not fits:
            raise UserError(f"{weight.path} is {shape} in the checkpoint, {needed} by config.json", str(self.folder))

    def _find(self, weight: Weight) -> tuple[str, TensorStorageMetadata]:
        stacked, single = weight.name, weight.name
        if weight.layer is not None:
            stacked, single = f"decoder.layers.{weight.name}", f"decoder.layers.{weight.layer}.{weight.name}"
        for key in (stacked, single):
            stored = self._metadata.state_dict_metadata.get(key)
            if isinstance(stored, TensorStorageMetadata):
                return key, stored
        raise UserError(f"has no {weight.path}: it is a checkpoint of another model", str(self.folder))


def _lead(weight: Weight, key: str) -> list[int]:
    """Return a parameter's indices in the leading dimensions of its key: of the layer where stacked, of the expert."""
    stacked = weight.layer is not None and not key.startswith(f"decoder.layers.{weight.layer}.")
    return [i for i, leads in ((weight.layer, stacked), (weight.expert, True)) if leads and i is not None]


def _check_seal(folder: Path) -> None:
    """Raise UserError if a file that every reader begins with does not have the checksum in the seal, if any."""
    with _refusing(f"not a whole checkpoint, cannot read its {SEAL}", folder):
        sealed = read_seal(folder)
    if sealed is None:
        return
    for name in ("metadata.json", ".metadata"):
        with _refusing(f"not a whole checkpoint, cannot read its {name}", folder):
            fault = sealed_fault(folder, sealed, name)
        if fault:
            raise UserError(f"not a whole checkpoint, {fault}", str(folder))


@contextlib.contextmanager
def _refusing(what: str, folder: Path) -> Iterator[None]:
    """Turn whatever reading a broken file raises into a UserError; a lack of memory stays what it is."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as e:
        raise UserError(f"{what}: {e}", str(folder)) from e


class _Into(DefaultLoadPlanner):
    """A minimal load planner for torch: every piece is read into one tensor."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self._out = out

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        places = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._out[tuple(slice(o, o + n) for o, n in places)]


def newest_checkpoint(checkpoints: Path, iteration: int | None = None) -> Checkpoint:
    """Return the checkpoint of an iteration, or the newest in a folder (which may be `release`, weights only).

    Raises:
        UserError: there is none, or it was never finished.
    """
    name = _newest(checkpoints) if iteration is None else str(iteration)
    folder = checkpoints / (f"iter_{int(name):07d}" if name.isdigit() else name)
    if not (folder / "metadata.json").exists():  # Megatron writes it last
        raise UserError("no such checkpoint, or one that was never finished", str(folder))
    return Checkpoint(folder)


def _newest(checkpoints: Path) -> str:
    """Return the content of Megatron's tracker file: a number, or `release`."""
    tracker = checkpoints / hub.TRACKER
    try:
        name = tracker.read_bytes().strip()
    except OSError:
        raise UserError("holds no checkpoint", str(checkpoints)) from None
    if not (name.isdigit() and len(name) < 20) and name != b"release":
        raise UserError("should hold the number of the newest checkpoint", str(tracker))
    return name.decode()


_INDEX = {
    "torch": {"Size", "device", *(n for n, x in vars(torch).items() if isinstance(x, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "collections": {"OrderedDict"},
}
"""The classes and functions that an index may refer to, by module."""


class _Index(pickle.Unpickler):
    """An unpickler that accepts only what an index consists of."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _INDEX.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong into an index of tensors")
        return super().find_class(module, name)


def read_index(path: Path) -> Metadata:
    """Read a checkpoint's `.metadata` without executing it. Raises UnpicklingError, or what a broken pickle may."""
    with path.open("rb") as file:
        metadata = _Index(file).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError("not an index of tensors")
    return metadata
