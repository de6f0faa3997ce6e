"""Reading and writing a model folder's safetensors: headers, slices by memory map, and files tensor by tensor.

Only safetensors are read: no file of a model folder is ever unpickled. What the tensors mean is in `weights`.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bft_megatron.errors import UserError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
INDEX = "model.safetensors.index.json"

_SHARD = re.compile(r"(?P<name>.+)-(?P<number>[0-9]{1,6})-of-(?P<total>[0-9]{1,6})\.safetensors")
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".gguf")


@dataclass(frozen=True)
class Entry:
    """A tensor's entry in a file's header."""

    file: Path
    dtype: str
    """The header's name of the dtype, such as `BF16`."""
    shape: tuple[int, ...]


def read_headers(folder: Path) -> dict[str, Entry]:
    """Return every tensor of the folder's safetensors by name, from their headers; checks the sizes of the files.

    Raises:
        UserError: no safetensors, or a shard that is missing or truncated.
    """
    entries: dict[str, Entry] = {}
    for file in _files(folder):
        entries |= read_header(file)
    return entries


class Reader:
    """A reader of parts of tensors from a folder's safetensors; it maps one file at a time."""

    def __init__(self, entries: dict[str, Entry]) -> None:
        self._entries = entries
        self._file: Path | None = None

    def __call__(self, name: str, index: tuple[Any, ...] = ()) -> Tensor:
        """Return the indexed part of a tensor in its dtype, a view of the mapped file."""
        file = self._entries[name].file
        if file != self._file:
            self._file, self._mapped = file, safe_open(file, framework="pt")
        view: Tensor = self._mapped.get_slice(name)[index or (slice(None),)]
        return view


@dataclass(frozen=True)
class Output:
    """A tensor to be written: its header entry, and a function that reads it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """The size of the tensor's data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write(path: Path, tensors: Iterable[Output], advance: Callable[[int], None]) -> None:
    """Write one safetensors file with one tensor in memory at a time, and flush it to disk.

    `safetensors.torch.save_file` needs all tensors of a file at once. `advance` gets the bytes of each tensor.
    """
    words = {dtype: word for word, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for t in tensors:
        header[t.name] = {"dtype": words[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.bytes]}
        at += t.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for t in tensors:
            value = t.read()
            assert value.shape == t.shape, f"{t.name}: {tuple(value.shape)} in place of {t.shape}"
            out.write(value.to(t.dtype).contiguous().view(torch.uint8).numpy().data)
            advance(t.bytes)
        out.flush()
        os.fsync(out.fileno())


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.exists():
        try:
            return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError("not an index of safetensors", str(index)) from None
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    return _numbered(folder)


def _numbered(folder: Path) -> list[Path]:
    """Return the shards of a folder without an index, if the numbers in their names say that all are there."""
    sets: dict[tuple[str, str], set[int]] = {}
    for file in folder.glob("*.safetensors"):
        if found := _SHARD.fullmatch(file.name):
            sets.setdefault((found["name"], found["total"]), set()).add(int(found["number"]))
    if len(sets) != 1:
        raise UserError(_other_weights(folder), str(folder))
    [((name, total), there)] = sets.items()
    wanted = range(1, int(total) + 1)
    names = [f"{name}-{number:0{len(total)}}-of-{total}.safetensors" for number in wanted]
    if missing := [names[number - 1] for number in wanted if number not in there]:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(f"{len(missing)} of {int(total)} shards are missing, {shown}: download them again", str(folder))
    return [folder / name for name in names]


def _other_weights(folder: Path) -> str:
    """Return what a folder without a readable set of safetensors holds instead, and what to do."""
    files = sorted(f.name for f in folder.iterdir() if f.suffix in (".safetensors", *_OTHER_FORMATS))
    shown = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
    if any(name.endswith(".safetensors") for name in files):
        return (
            f"read are model.safetensors, or the shards of one model; the folder holds {shown}: rename or remove some"
        )
    message = "no safetensors in this folder (other formats of weights are not read)"
    if not files:
        return f"{message}: download the model again, with its weights"
    gguf = f", gguf_file={files[0]!r}" if files[0].endswith(".gguf") else ""
    return (
        f"{message}, but {shown}: get the model as safetensors, or write it anew with transformers, "
        f"AutoModelForCausalLM.from_pretrained({str(folder)!r}{gguf}).save_pretrained(NEW_FOLDER)"
    )


def read_header(file: Path) -> dict[str, Entry]:
    """Return every tensor of one safetensors file by name, from its header; checks the size of the file.

    Raises:
        UserError: the file is missing, truncated or not safetensors.
    """
    try:
        with open(file, "rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            size = os.fstat(f.fileno()).st_size
            header = json.loads(f.read(min(length, size)))
            header.pop("__metadata__", None)
            end = max((x["data_offsets"][1] for x in header.values()), default=0)
            entries = {name: Entry(file, x["dtype"], tuple(x["shape"])) for name, x in header.items()}
    except FileNotFoundError:
        raise UserError("this shard of the model is missing", str(file)) from None
    except OSError as e:
        raise UserError(f"cannot read this shard of the model: {e.strerror}", str(file)) from None
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        raise UserError("not a whole safetensors file; download it again", str(file)) from None
    if size != 8 + length + end:
        raise UserError(f"{size} bytes in place of {8 + length + end}: a broken download; get it again", str(file))
    return entries
