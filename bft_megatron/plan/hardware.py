"""Published specifications of GPUs and their links; none of them measured by us."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from bft_megatron.errors import UserError
from bft_megatron.recipe.limits import Range


@dataclass(frozen=True)
class Gpu:
    """One GPU in a node of eight. Bandwidths in bytes/s, one direction."""

    name: str
    memory: float
    """Capacity in GiB as PyTorch reports it, a little less than in the name."""
    flops: float
    """Dense bf16 FLOP/s."""
    hbm: float
    nvlink: float
    """Bandwidth between GPUs of a node."""
    network: float
    """A GPU's share of the bandwidth between nodes."""


@dataclass(frozen=True)
class Cluster:
    """The GPUs that a recipe is planned for."""

    gpu: Gpu
    world: int
    """Number of GPUs."""
    gpus_per_node: int


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100-80g", 79.1, 989e12, 3.35e12, 450e9, 50e9),  # SXM, NVLink 4, 400 Gbit/s a GPU
        Gpu("h200", 139.7, 989e12, 4.8e12, 450e9, 50e9),
        Gpu("b200", 178.3, 2250e12, 7.7e12, 900e9, 50e9),  # NVLink 5
        Gpu("a100-80g", 79.1, 312e12, 2.04e12, 300e9, 25e9),  # SXM, NVLink 3, 200 Gbit/s a GPU
        Gpu("a100-40g", 39.3, 312e12, 1.56e12, 300e9, 25e9),
    )
}
"""Name -> GPU, from the makers' data sheets."""


CPU = "cpu"


def share_of_this_machine(processes: int) -> Gpu:
    """Return one process's share of this machine's memory, for a run on the CPU; its speed is not estimated."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Gpu(CPU, memory / processes, 0.0, 0.0, 0.0, 0.0)


def lookup(name: str) -> Gpu:
    """Return a GPU by its name, or an H100 with the given GiB of memory.

    Raises:
        UserError: the name is neither known nor a number.
    """
    if name in GPUS:
        return GPUS[name]
    try:
        memory = float(name)
    except ValueError:
        raise UserError(f"no GPU is known by this name; known: {', '.join(GPUS)}, or its memory in GiB", name) from None
    if fault := Range(above=0).fault(memory, name):
        raise UserError(f"the GiB of a GPU's memory {fault}", "--gpu")
    return replace(GPUS["h100-80g"], name=f"{memory:g} GiB", memory=memory)
