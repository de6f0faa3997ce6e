"""Exporting a torch_dist checkpoint of any layout as a Hugging Face model: one process, one tensor in memory.

No model is built. Each tensor is written as it is read, so 70B needs some GiB, not 140; an interrupted export resumes
with the next file. `torch_dist` reads the checkpoint, `weights` says which part of a parameter a tensor is, and
`shards` writes the files.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from bft_megatron.data.folders import USERS
from bft_megatron.errors import UserError
from bft_megatron.hf import carried, exported_config, hub, joined_experts, shards, stops
from bft_megatron.hf.architectures import companions, read_config
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.hf.tensors import HFTensor, Weight
from bft_megatron.hf.torch_dist import Checkpoint, newest_checkpoint
from bft_megatron.hf.weights import places, weights
from bft_megatron.processes import lease


def export(
    checkpoints: Path,
    out: Path,
    hf_folder: Path,
    *,
    base: str | None = None,
    iteration: int | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: float = 5e9,
) -> None:
    """Write a checkpoint as a folder that transformers and vLLM read; it gets its name only when it is complete.

    After an error or a signal, the same call keeps the files of weights that were finished.

    Args:
        checkpoints: a run's checkpoints: `iter_*` folders and the tracker file that names the newest.
        out: folder to write; must be empty or not exist.
        hf_folder: folder with config.json, generation config, tokenizer and template, which are copied.
        base: the model that the run started from, a folder or an id: what is not trained is copied from there.
        iteration: the checkpoint's iteration; None: the newest.
        dtype: dtype of the written weights (set in config.json too); None: the checkpoint's.
        shard_bytes: maximum size of a file of weights; a larger tensor gets a file of its own.

    Raises:
        UserError: no such checkpoint, or it belongs to another model, or a file of it is missing or broken; or the
            model has a vision part, and the base's files are gone; or `out` cannot be written.
        InUse: another process is writing it.
    """
    refuse_used(out)
    checkpoint = newest_checkpoint(checkpoints, iteration)
    tensors = [_output(checkpoint, *item, dtype) for item in places(read_config(hf_folder)).items()]
    began_with = None if base is None else Path(base)
    write_model(out, hf_folder, tensors, f"{checkpoint.identity} {shard_bytes}", shard_bytes, began_with)


def refuse_used(out: Path) -> None:
    """Raise UserError if the folder to write is not empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("is not empty; choose another folder, or remove it", str(out))


def write_model(
    out: Path,
    hf_folder: Path,
    tensors: list[shards.Output],
    source: str,
    shard_bytes: float = 5e9,
    base: Path | None = None,
) -> None:
    """Write a model folder of these tensors, reading each just before it is written; otherwise as `export`.

    What is fp32 in any model, such as the decay of a gated delta net, is written so whatever the dtype of the other
    weights. The experts of a layer are joined where they are in the base's files.
    Prints the model's stop tokens where they are not only those of its config.json, and what becomes of the tensors
    that are not trained.

    Args:
        tensors: those of the table of `weights`.
        source: identifies the values; files of an earlier, interrupted call are kept only if it had the same.
        base: the model that the run started from, a folder or an id, from which what is not trained is copied; None:
            unknown.
    """
    config, files = read_config(hf_folder), None if base is None else hub.origin(str(base))
    more, dtype = carried.outputs(files, config), tensors[0].dtype
    fp32 = {t.name for w in weights(config) if w.fp32 for t in w.tensors}
    own = [replace(t, dtype=torch.float32) if t.name in fp32 else t for t in tensors]
    everything = [*joined_experts.join(own, carried.entries_of(files), config), *more]
    with written_whole(out, f"{source} {[(t.name, t.dtype, t.shape) for t in everything]}") as partial:
        _copy_companions(hf_folder, partial)
        _write_config(hf_folder, partial, config, dtype, prediction=carried.has_prediction(more))
        _write_shards(partial, everything, shard_bytes)
    stops.announce(hf_folder)
    carried.announce(more, config)


@contextlib.contextmanager
def written_whole(out: Path, content: str | None = None) -> Iterator[Path]:
    """Yield a folder beside `out` to write into, and rename it to `out` on success.

    Args:
        content: identifies what is written. After an error or a kill, a folder with finished weights is kept and
            yielded again for the same content; with None it is removed.

    Raises:
        UserError: the folder cannot be written.
        InUse: another process is writing it.
    """
    partial = out.absolute().with_name(f".{out.name}.partial")
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with lease.held(lease.beside(out.absolute())):
            partial.mkdir(exist_ok=True)
            try:
                _clear_unless(content, partial)
                yield partial
                (partial / ".content").unlink()
                partial.rename(out)
            finally:
                if content is None or not any(partial.glob("*.safetensors")):
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as e:
        message = f"cannot write the model: {e.strerror or e}"
        if e.errno in USERS:
            raise UserError(message, str(out)) from e
        raise OSError(f"{out}: {message}") from e


def _clear_unless(content: str | None, partial: Path) -> None:
    """Remove an earlier call's files unless it had the same content, and note the content."""
    note = partial / ".content"
    if content is not None and note.exists() and note.read_bytes() == content.encode():
        return
    for file in partial.iterdir():
        file.unlink()
    note.write_bytes((content or "").encode())


def _output(
    checkpoint: Checkpoint, tensor: HFTensor, parts: list[tuple[Weight, int]], dtype: torch.dtype | None
) -> shards.Output:
    """Return a tensor as an output that reads its parts of these weights when it is written."""
    weight = parts[0][0]
    for part, _ in parts:
        checkpoint.check_shape(part)
    dtype = dtype or checkpoint.dtype(weight)
    if dtype not in shards.DTYPES.values():
        raise UserError(f"{weight.path} has the dtype {dtype}: choose one with --dtype", str(checkpoint.folder))
    return shards.Output(tensor.name, dtype, tensor.shape, lambda: checkpoint.read_whole(tensor, parts))


def _copy_companions(source: Path, target: Path) -> None:
    """Copy a model's files other than weights."""
    for file in companions(source):
        shutil.copyfile(file, target / file.name)


def _write_config(source: Path, target: Path, config: ModelConfig, dtype: torch.dtype, *, prediction: bool) -> None:
    """Write config.json anew if it does not describe the weights; see `exported_config`."""
    raw = json.loads((source / "config.json").read_text())
    changed = exported_config.changed(raw, config, str(dtype).removeprefix("torch."), prediction=prediction)
    if changed != raw:
        (target / "config.json").write_text(json.dumps(changed, indent=2) + "\n")


def _write_shards(folder: Path, tensors: list[shards.Output], shard_bytes: float) -> None:
    """Write the weights as one file, or as several with an index."""
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
            if (folder / name).exists():  # written by an interrupted export
                bar.advance(task, sum(t.bytes for t in group))
            else:
                temporary = folder / f"{name}.tmp"
                shards.write(temporary, group, lambda written: bar.advance(task, written))
                os.replace(temporary, folder / name)
            index |= {t.name: name for t in group}
    if not one:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2, sort_keys=True)
        (folder / shards.INDEX).write_text(text + "\n")
