"""Measures the peak memory of exporting a model of Llama-3.1-70B's shapes from a checkpoint of zeros, written first.

    python benchmarks/export.py FOLDER 1 3      # numbers of layers out of 80 equal ones; three take 19 GB of disk

Each export runs in its own process; the memory that the libraries take before it starts is printed beside the peak.
"""

from __future__ import annotations

import json
import pickle
import resource
import shutil
import sys
import time
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.export import export
from bft_megatron.hf.hub import TRACKER
from bft_megatron.hf.tensors import Weight
from bft_megatron.hf.weights import weights

TP = 8
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
}


def write_checkpoint(folder: Path, model: Path) -> None:
    """Write a checkpoint of zeros in bf16, with layers stacked and TP-sharded as Megatron writes them."""
    config = read_config(model)
    target = folder / "iter_0000001"
    target.mkdir(parents=True)
    files = [(target / f"__{rank}_0.distcp").open("wb") for rank in range(TP)]
    tensors, records = {}, {}
    for weight in (w for w in weights(config) if w.layer in (None, 0)):
        lead = [] if weight.layer is None else [config.layers]
        key = weight.name if weight.layer is None else f"decoder.layers.{weight.name}"
        size, chunk, counts = _cut(weight)
        places = list(product(*(range(n) for n in lead), *(range(n) for n in counts)))
        chunks = []
        for place in places:
            rank = max(place[len(lead) :])
            offsets = (*place[: len(lead)], *(i * n for i, n in zip(place[len(lead) :], chunk, strict=True)))
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size([*(1 for _ in lead), *chunk])))
            at = files[rank].tell()
            torch.save(torch.zeros(chunks[-1].sizes, dtype=torch.bfloat16), files[rank])
            length = files[rank].tell() - at
            records[MetadataIndex(key, torch.Size(offsets))] = _StorageInfo(f"__{rank}_0.distcp", at, length)
        properties = TensorProperties(dtype=torch.bfloat16)
        tensors[key] = TensorStorageMetadata(properties, torch.Size([*lead, *size]), chunks)
    for file in files:
        file.close()
    (target / ".metadata").write_bytes(pickle.dumps(Metadata(tensors, storage_data=records)))
    (target / "metadata.json").write_text("{}")
    (folder / TRACKER).write_text("1")


def _cut(weight: Weight) -> tuple[list[int], list[int], list[int]]:
    """Return a parameter's shape, the shape of a TP rank's part, and the number of parts along each axis."""
    size = [sum(t.shape[0] for t in weight.tensors), *weight.tensors[0].shape[1:]]
    counts = [TP if axis == weight.axis else 1 for axis in range(len(size))]
    return size, [n // c for n, c in zip(size, counts, strict=True)], counts


def measure(checkpoints: Path, model: Path, out: Path) -> None:
    """Export, and print the time and this process's peak resident memory."""
    before, start = _peak(), time.monotonic()
    export(checkpoints, out, model)
    layers, files = read_config(model).layers, len(list(out.glob("*.safetensors")))
    size = sum(f.stat().st_size for f in out.glob("*.safetensors")) / 1e9
    seconds = time.monotonic() - start
    print(
        f"| {layers} | {size:.1f} GB | {files} | {before:.2f} GiB | {_peak():.2f} GiB | {seconds:.0f} s |", flush=True
    )


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Write, measure and remove one checkpoint after the other."""
    folder, counts = Path(sys.argv[1]), [int(x) for x in sys.argv[2:]] or [1, 3]
    print("| layers | size | files | memory before | peak | time |\n| --- | --- | --- | --- | --- | --- |")
    for layers in counts:
        work = folder / f"export-{layers}"
        try:
            (work / "model").mkdir(parents=True)
            (work / "model" / "config.json").write_text(json.dumps(LLAMA_70B | {"num_hidden_layers": layers}))
            write_checkpoint(work / "checkpoints", work / "model")
            process = get_context("spawn").Process(
                target=measure, args=(work / "checkpoints", work / "model", work / "out")
            )
            process.start()
            process.join()
        finally:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
