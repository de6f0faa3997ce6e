"""Starts a rank: its device, the group of all ranks, and Megatron's parsed arguments."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from bft_megatron.cpu import backend
from bft_megatron.recipe.schema import Recipe
from bft_megatron.training import arguments

GPU_FLAGS = ["--transformer-impl", "transformer_engine", "--distributed-backend", "nccl", "--num-workers", "1"]


def runs_on_cpu(recipe: Recipe) -> bool:
    """Whether this rank computes on the CPU: as the recipe says, or for want of a GPU."""
    return recipe.device == "cpu" or not backend.gpu_is_visible()


def device_flags(on_cpu: bool) -> list[str]:
    """What only the CPU or only GPUs need of Megatron's flags."""
    return backend.MEGATRON_FLAGS if on_cpu else GPU_FLAGS


def join(recipe: Recipe, on_cpu: bool) -> None:
    """Form the group of all ranks, unless there is one. Before Megatron does: checkpoints are looked at first.

    Ranks that wait for a lost one give up after Megatron's own `distributed-timeout-minutes`, 10 by default.
    """
    if on_cpu:
        backend.install()
    if dist.is_initialized():
        return
    timeout = timedelta(minutes=arguments.passed_through(recipe).get("distributed-timeout-minutes", 10))
    if on_cpu:
        dist.init_process_group("gloo", timeout=timeout)
    else:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timeout, device_id=device)


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
