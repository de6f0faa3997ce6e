"""Every shipped recipe is accepted by our checks and by Megatron, at its model's real sizes and its number of GPUs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bft_megatron.hf.architectures import ModelConfig, megatron_flags, read_config
from bft_megatron.plan.known import CONFIGS
from bft_megatron.recipe import reader, rules
from bft_megatron.recipe.schema import Recipe
from bft_megatron.training import initialize
from bft_megatron.training.arguments import check_passed_through, megatron_arguments
from bft_megatron.upstream import command_line
from tests.world import run_world

RECIPES = Path(__file__).parents[1] / "recipes"

# recipe -> GPUs that its first lines name
SHIPPED = {
    "llama31_8b": 8,
    "llama31_70b": 64,
    "llama31_405b": 128,
    "qwen25_7b": 8,
    "qwen25_32b": 16,
    "qwen3_8b": 8,
}

# What the recipes' comments propose for another number of GPUs.
VARIANTS = {
    "llama31_70b on 4 nodes": (
        "llama31_70b",
        32,
        ["data.seq_length=4096", "parallel.context=1", "megatron.grad-reduce-in-bf16=true"],
    ),
    "llama31_8b with fp32 gradients": (
        "llama31_8b",
        8,
        ["parallel.tensor=2", "megatron.grad-reduce-in-bf16=false"],
    ),
    "llama31_8b with the optimizer in host memory": (
        "llama31_8b",
        8,
        ["megatron.optimizer-cpu-offload=true", "megatron.use-precision-aware-optimizer=true"],
    ),
    "llama31_70b with recompute": ("llama31_70b", 64, ["megatron.recompute-granularity=selective"]),
    "llama31_405b on 32 nodes": ("llama31_405b", 256, []),
    "qwen3_8b on 4": ("qwen3_8b", 4, []),
    "qwen3_8b at 32k": (
        "qwen3_8b",
        8,
        ["data.seq_length=32768", "parallel.context=2", "train.global_batch_size=8"],
    ),
}
CASES = {name: (name, gpus, []) for name, gpus in SHIPPED.items()} | VARIANTS


def test_every_recipe_is_tried():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == SHIPPED.keys() | {"tiny", "cpu_demo"}


@pytest.mark.parametrize("case", CASES)
def test_recipe(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Our checks and Megatron's own parser and validation, as rank 0 of the real world, accept it."""
    name, gpus, overrides = CASES[case]
    made = reader.load(RECIPES / f"{name}.yaml", [*overrides, f"output={tmp_path}"])
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[made.model]))
    config = read_config(tmp_path)
    rules.check_recipe(made, config)
    rules.check_world(made, gpus)
    [seen] = run_world(1, accepted, made, config, gpus)
    one_copy = rules.model_parallel_size(made)
    assert seen["data_parallel_size"] == gpus // one_copy
    assert seen["grad_reduce_in_bf16"] == bool(made.megatron.get("grad-reduce-in-bf16"))
    assert seen["accumulate_allreduce_grads_in_fp32"] != seen["grad_reduce_in_bf16"]
    assert seen["sequence_parallel"] == (made.parallel.tensor > 1)
    assert seen["overlap_grad_reduce"]
    assert seen["overlap_param_gather"]
    assert seen["bf16"]


def accepted(made: Recipe, config: ModelConfig, gpus: int) -> dict[str, object]:
    """In a process of its own: Megatron's arguments are global."""
    os.environ["WORLD_SIZE"] = str(gpus)
    torch.cuda.get_device_properties = lambda _: SimpleNamespace(major=9)  # the one thing that is asked of the hardware
    check_passed_through(made)
    flags = megatron_arguments(made, megatron_flags(config), initialize.GPU_FLAGS, 100, (0, 0))
    return vars(command_line.parse(flags))
