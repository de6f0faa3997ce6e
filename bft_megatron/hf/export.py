"""A torch_dist checkpoint of any layout as a Hugging Face model: one process, no model built, one tensor in memory.

Writes each tensor as it is read, so 70B needs some GiB, not 140; what was cut short goes on with the next file. Reading
checkpoints is in `torch_dist`, which part of which parameter a tensor is in `weights`, the files are in `shards`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console
from rich.progress import Progress

from bft_megatron.errors import UserError
from bft_megatron.hf import shards
from bft_megatron.hf.architectures import companions, read_config
from bft_megatron.hf.torch_dist import Checkpoint, newest_checkpoint
from bft_megatron.hf.weights import Weight, weights


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

    Cut short by an error or a signal, the same call again keeps the files of weights that were finished.

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
    write_model(out, hf_folder, tensors, f"{checkpoint.identity} {shard_bytes}", shard_bytes)


def refuse_used(out: Path) -> None:
    """Raise UserError where the folder to write holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("is not empty; choose another folder, or remove it", str(out))


def write_model(
    out: Path, hf_folder: Path, tensors: list[shards.Output], source: str, shard_bytes: float = 5e9
) -> None:
    """Write a model folder of these tensors, each read when its turn comes; the rest as in `export`.

    Args:
        source: where the values come from; files that an earlier call left are kept only if it was the same.
    """
    with written_whole(out, f"{source} {[(t.name, t.dtype, t.shape) for t in tensors]}") as partial:
        _copy_companions(hf_folder, partial, tensors[0].dtype)
        _write_shards(partial, tensors, shard_bytes)


@contextlib.contextmanager
def written_whole(out: Path, content: str | None = None) -> Iterator[Path]:
    """A folder beside `out` to write into, which gets its name where no error comes.

    Args:
        content: what is being written. Where an error comes, or the process is killed, a folder with finished weights
            stays, and is given out again for the same content; without one it is removed.

    Raises:
        UserError: it cannot be written, or another process is writing it.
    """
    partial = out.absolute().with_name(f".{out.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with (partial / ".content").open("a+") as note:
            _lock(note, out)
            try:
                _clear_unless(content, partial, note)
                yield partial
                (partial / ".content").unlink()
                partial.rename(out)
            finally:
                if content is None or not any(partial.glob("*.safetensors")):
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as e:
        raise UserError(f"cannot write the model: {e.strerror}", str(out)) from e


def _clear_unless(content: str | None, partial: Path, note: TextIO) -> None:
    """Remove what an earlier call left, unless it was writing the same, and note what is being written."""
    note.seek(0)
    if content is not None and note.read() == content:
        return
    for file in partial.iterdir():
        if file.name != ".content":
            file.unlink()
    note.truncate(0)
    note.write(content or "")
    note.flush()


def _lock(file: TextIO, out: Path) -> None:
    """Hold a lock until the file is closed, where the file system has locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError("another process is writing it", str(out)) from None
    except OSError:
        pass


def _output(checkpoint: Checkpoint, weight: Weight, index: int, dtype: torch.dtype | None) -> shards.Output:
    """Tensor number `index` of a weight, read when it is written."""
    tensor = weight.tensors[index]
    checkpoint.check_shape(weight)
    dtype = dtype or checkpoint.dtype(weight)
    if dtype not in shards.DTYPES.values():
        raise UserError(f"{weight.path} has the dtype {dtype}: choose one with --dtype", str(checkpoint.folder))
    return shards.Output(tensor.name, dtype, tensor.shape, lambda: checkpoint.read_tensor(weight, index))


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
            if (folder / name).exists():  # of an export that was cut short
                bar.advance(task, sum(t.bytes for t in group))
            else:
                temporary = folder / f"{name}.tmp"
                shards.write(temporary, group, lambda written: bar.advance(task, written))
                os.replace(temporary, folder / name)
            index |= {t.name: name for t in group}
    if not one:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2, sort_keys=True)
        (folder / shards.INDEX).write_text(text + "\n")
