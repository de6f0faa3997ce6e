"""Starts a rank: its device, the group of all ranks, and Megatron's parsed arguments."""

from __future__ import annotations

import importlib.util
import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from bft_megatron.cpu import backend, optimizer
from bft_megatron.layers import rotary
from bft_megatron.recipe.schema import Recipe
from bft_megatron.training import arguments

GPU_FLAGS = ["--transformer-impl", "transformer_engine", "--distributed-backend", "nccl", "--num-workers", "1"]
TORCH_LAYER_FLAGS = [
    *("--transformer-impl", "local"),
    "--no-persist-layer-norm",
    "--no-masked-softmax-fusion",
    "--no-rope-fusion",  # apex's or Transformer Engine's kernel
    *("--distributed-backend", "nccl", "--num-workers", "1"),
]
"""In place of `GPU_FLAGS` on a GPU without Transformer Engine."""


def runs_on_cpu(recipe: Recipe) -> bool:
    """Whether this rank computes on the CPU: as the recipe says, or for want of a GPU."""
    return recipe.device == "cpu" or not backend.gpu_is_visible()


def device_flags(on_cpu: bool) -> list[str]:
    """Megatron's flags for this device, and for the layers that it has."""
    if on_cpu:
        return backend.MEGATRON_FLAGS
    return TORCH_LAYER_FLAGS if torch_layers(on_cpu) else GPU_FLAGS


def torch_layers(on_cpu: bool) -> bool:
    """Whether the layers are this package's (`layers`): on the CPU, and on a GPU without Transformer Engine."""
    return on_cpu or importlib.util.find_spec("transformer_engine") is None


def join(recipe: Recipe, on_cpu: bool) -> None:
    """Form the group of all ranks, unless there is one. Before Megatron does: checkpoints are looked at first.

    Ranks that wait for a lost one give up after Megatron's own `distributed-timeout-minutes`, 10 by default.
    """
    without_compiling()
    if on_cpu:
        backend.install()
    if torch_layers(on_cpu):
        optimizer.install()
        rotary.install()
    if dist.is_initialized():
        return
    timeout = timedelta(minutes=arguments.passed_through(recipe).get("distributed-timeout-minutes", 10))
    if on_cpu:
        dist.init_process_group("gloo", timeout=timeout)
    else:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timeout, device_id=device)


def without_compiling() -> None:
    """Keep Megatron from compiling its data set helper: its wheel ships the compiled one and not its Makefile."""
    from megatron.core.datasets import utils

    utils.compile_helpers = lambda: None


def parse(flags: list[str]) -> Any:
    """Megatron's parsed and validated arguments, which also become its global ones. It reads `sys.argv` and nothing
    else.
    """
    from megatron.training.arguments import parse_and_validate_args

    before, sys.argv = sys.argv, ["bft-megatron", *flags]
    try:
        return parse_and_validate_args()
    finally:
        sys.argv = before
