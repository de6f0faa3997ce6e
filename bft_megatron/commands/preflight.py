"""Checks on one node before a batch job's ranks start, of faults that would end the job after hours in the queue.

launch/lib.sh calls it through `srun`, once a node. It claims no GPU.
"""

from __future__ import annotations

import contextlib
import glob
import math
import os
import shutil
from pathlib import Path

from bft_megatron.checkpoint import integrity
from bft_megatron.checkpoint.sizes import CHECKPOINT_BYTES, OPTIMIZER_BYTES
from bft_megatron.errors import UserError
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.hf.weights import parameter_count, weights
from bft_megatron.installation import layers
from bft_megatron.installation.parts import torch_and_driver
from bft_megatron.processes import lease
from bft_megatron.recipe.layout_rules import check_world
from bft_megatron.recipe.schema import ParallelSettings, Recipe
from bft_megatron.run.folder import RunFolder
from bft_megatron.run.prepared import open_rows

SHARED_MEMORY = 2**30
"""Bytes of /dev/shm that a node's NCCL ranks and data workers need; a container has 64 MiB by default."""


def preflight(recipe: Recipe, config: ModelConfig, world: int, per_node: int) -> None:
    """Check the layout, the prepared rows, and this node's GPUs, disk and memory.

    Args:
        world: ranks of the job.
        per_node: ranks on this node.

    Raises:
        FieldError, UserError: the first fault that is found; one of this node names the node.
        InUse: on the first node, another command uses the run's folder.
    """
    layers.check(recipe)
    check_world(recipe, world)
    if os.environ.get("SLURM_PROCID", "0") == "0":
        with contextlib.suppress(OSError):  # the ranks' own errors say more
            lease.clear(RunFolder.of(recipe).lease)
    rows = open_rows(recipe)
    node, parameters = os.uname().nodename, parameter_count(config)
    gpus = len(glob.glob("/dev/nvidia[0-9]*"))
    if recipe.device != "cpu" and gpus < per_node:
        raise UserError(f"has {gpus} GPUs, the job has {per_node} ranks on it", node)
    if recipe.device != "cpu":
        _check_driver(node)
    if recipe.device != "cpu" and (shared := shutil.disk_usage("/dev/shm").total) < SHARED_MEMORY:
        raise UserError(f"/dev/shm has {_gib(shared)}, it takes {_gib(SHARED_MEMORY)}: docker run --ipc=host", node)
    if recipe.lora is None:
        _check_disk(recipe, rows.steps, CHECKPOINT_BYTES * parameters)
        # On the host, while a rank's optimizer state is gathered for a save or a load.
        state = OPTIMIZER_BYTES * _on_a_rank(config, recipe.parallel) * per_node
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if memory < state:
            sizes = "tensor or pipeline" if config.experts is None else "expert, tensor or pipeline"
            raise UserError(
                f"has {_gib(memory)} of memory; a save gathers {_gib(state)} of optimizer state on it. Raise "
                f"parallel.{sizes}, or set `dist-ckpt-optim-fully-reshardable: false` under `megatron`",
                node,
            )


def _check_driver(node: str) -> None:
    """Raise UserError if torch cannot use this node's GPUs."""
    last = torch_and_driver()[-1]
    if last.state != "good":
        raise UserError(f"{last.name} {last.found}: {last.says}; see `bft-megatron doctor` there", node)


def _on_a_rank(config: ModelConfig, parallel: ParallelSettings) -> float:
    """Return the number of parameters that a rank holds, the experts' by their own layout."""
    experts = sum(math.prod(t.shape) for w in weights(config) if w.expert is not None for t in w.tensors)
    dense = parameter_count(config) - experts
    return dense / (parallel.tensor * parallel.pipeline) + experts / parallel.expert_model_parallel_size


def _check_disk(recipe: Recipe, steps: int, size: float) -> None:
    """Raise UserError if the checkpoints that the run has yet to write do not fit, each of `size` bytes."""
    folder, most = RunFolder.of(recipe), recipe.train.keep_last + recipe.train.keep_best + 1
    whole = [i for i in folder.iterations() if integrity.damage(folder.checkpoint(i), contents=False) is None]
    if max(whole, default=0) >= steps:
        return
    need = max(1, most - len(whole)) * size
    disk = _existing(folder.root)
    free = shutil.disk_usage(disk).free
    if free < need:
        raise UserError(
            f"has {_gib(free)} free, the run needs {_gib(need)}: it keeps up to {most - 1} checkpoints of {_gib(size)} "
            f"and writes one more, {len(whole)} are there; free some, or lower train.keep_last or keep_best",
            str(disk),
        )


def _existing(folder: Path) -> Path:
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size < 2**30 else f"{size / 2**30:,.0f} GiB"
