"""Every shipped recipe is accepted by our checks and by Megatron, at its model's real sizes and its number of GPUs."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bft_megatron.checkpoint.sizes import CHECKPOINT_BYTES
from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.megatron_flags import megatron_flags
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.hf.weights import parameter_count
from bft_megatron.plan.known import CONFIGS
from bft_megatron.recipe import layout_rules, reader, rules
from bft_megatron.recipe.schema import Recipe
from bft_megatron.training import initialize
from bft_megatron.training.arguments import check_passed_through, megatron_arguments
from bft_megatron.upstream import command_line
from tests.helpers.shipped import CASES, RECIPES, SHIPPED
from tests.helpers.world import run_world


def test_every_recipe_is_tried():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == SHIPPED.keys() | {
        "tiny",
        "tiny_moe",
        "tiny_hybrid",
        "cpu_demo",
    }


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_the_disk_that_a_recipe_names_is_that_of_its_checkpoint(name: str, tmp_path: Path):
    text = (RECIPES / f"{name}.yaml").read_text()
    size, unit = re.findall(r"([\d.]+) (GB|TB) a checkpoint", text)[0]
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[reader.load(RECIPES / f"{name}.yaml").model]))
    real = CHECKPOINT_BYTES * parameter_count(read_config(tmp_path))
    assert float(size) * {"GB": 1e9, "TB": 1e12}[unit] == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("case", CASES)
def test_recipe(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Our checks and Megatron's own parser and validation, as rank 0 of the real world, accept it."""
    name, gpus, overrides = CASES[case]
    made = reader.load(RECIPES / f"{name}.yaml", [*overrides, f"output={tmp_path}"])
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[made.model]))
    config = read_config(tmp_path)
    rules.check_recipe(made, config)
    layout_rules.check_world(made, gpus)
    [seen] = run_world(1, accepted, made, config, gpus)
    one_copy = made.parallel.model_parallel_size
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
