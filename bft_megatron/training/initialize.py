"""Start of a rank: its device and the group of all ranks."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from bft_megatron.installation import layers
from bft_megatron.processes import ranks
from bft_megatron.recipe.schema import Recipe
from bft_megatron.training import kernels
from bft_megatron.upstream import cuda_on_cpu, dataset_helpers, rotary, torch_adam

CPU_FLAGS = [
    *("--transformer-impl", "local"),
    *("--distributed-backend", "gloo"),
    "--use-cpu-initialization",  # CPU only: with this flag Megatron would never move the model to a GPU
    *("--num-workers", "0"),
    "--no-persist-layer-norm",
    "--no-masked-softmax-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    "--no-rope-fusion",
]
"""Megatron's arguments on the CPU, where its CUDA kernels are not available."""
GPU_FLAGS = ["--transformer-impl", "transformer_engine", "--distributed-backend", "nccl", "--num-workers", "1"]
"""Megatron's arguments on a GPU with Transformer Engine."""
TORCH_LAYER_FLAGS = [
    *("--transformer-impl", "local"),
    "--no-persist-layer-norm",
    "--no-masked-softmax-fusion",
    "--no-rope-fusion",  # the fused kernel is apex's or Transformer Engine's
    *("--distributed-backend", "nccl", "--num-workers", "1"),
]
"""Megatron's arguments on a GPU without Transformer Engine."""


def runs_on_cpu(recipe: Recipe) -> bool:
    """Return whether this rank computes on the CPU, because the recipe says so or no GPU is visible."""
    return recipe.device == "cpu" or not cuda_on_cpu.gpu_is_visible()


def device_flags(recipe: Recipe, *, experts: bool) -> list[str]:
    """Return Megatron's flags for this device and its layers.

    Args:
        experts: whether the model has experts.
    """
    if runs_on_cpu(recipe):
        return CPU_FLAGS
    if torch_layers(recipe):
        return TORCH_LAYER_FLAGS
    return [*GPU_FLAGS, *(kernels.expert_flags() if experts else [])]


def torch_layers(recipe: Recipe) -> bool:
    """Return whether the package's own `layers` are used: on the CPU, and on a GPU as the recipe's `layers` says."""
    if recipe.layers == "auto":
        return runs_on_cpu(recipe) or not layers.transformer_engine_is_there()
    return runs_on_cpu(recipe) or recipe.layers == "torch"


def join(recipe: Recipe, on_cpu: bool) -> None:
    """Form the group of all ranks, unless it exists already. Collective.

    This happens before Megatron's own initialization, because the ranks look for the newest checkpoint first. Ranks
    that wait for a lost rank give up after Megatron's `distributed-timeout-minutes`, 10 by default.
    """
    if on_cpu:
        cuda_on_cpu.install()
    else:
        dataset_helpers.without_compiling()
        if torch_adam.in_use():
            torch_adam.install()
    if torch_layers(recipe):
        rotary.install()
    if dist.is_initialized():
        return
    timeout = timedelta(minutes=recipe.megatron.get("distributed-timeout-minutes", 10))
    if on_cpu:
        dist.init_process_group("gloo", timeout=timeout)
    else:
        device = torch.device("cuda", ranks.local_rank())
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
