"""What is looked at on every node before the ranks of a batch job start."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bft_megatron.checkpoint.sizes import CHECKPOINT_BYTES, OPTIMIZER_BYTES
from bft_megatron.commands.preflight import preflight
from bft_megatron.errors import FieldError, UserError
from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.model_config import Experts, ModelConfig
from bft_megatron.hf.weights import parameter_count
from bft_megatron.recipe import reader
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.folder import RunFolder
from bft_megatron.run.prepared import prepare_rows
from tests.helpers.commands import ROOT

TINY = ROOT / "recipes/tiny"


@pytest.fixture
def config() -> ModelConfig:
    return read_config(TINY)


@pytest.fixture
def recipe(tmp_path: Path, config: ModelConfig) -> Recipe:
    """The tiny recipe at TP 2, its data prepared."""
    made = reader.load(ROOT / "recipes/tiny.yaml", [f"output={tmp_path}", "device=cpu", "parallel.tensor=2"])
    made = replace(made, data=replace(made.data, train=str(ROOT / made.data.train), valid=None, pad_multiple=1))
    prepare_rows(made, TINY, config.vocab_size)
    return made


def test_all_is_well(recipe: Recipe, config: ModelConfig):
    preflight(recipe, config, world=8, per_node=4)


def test_layout_against_the_ranks(recipe: Recipe, config: ModelConfig):
    with pytest.raises(FieldError, match="7"):
        preflight(recipe, config, world=7, per_node=7)


def test_data_that_are_not_prepared(recipe: Recipe, config: ModelConfig, tmp_path: Path):
    with pytest.raises(UserError, match="prepare"):
        preflight(replace(recipe, output=str(tmp_path / "other")), config, world=8, per_node=4)


def test_gpus(recipe: Recipe, config: ModelConfig):
    with pytest.raises(UserError, match=f"{os.uname().nodename}.*has 0 GPUs, the job has 4 ranks on it"):
        preflight(replace(recipe, device="auto"), config, world=8, per_node=4)


def test_a_node_whose_torch_sees_no_driver(recipe: Recipe, config: ModelConfig):
    with pytest.raises(UserError, match=r"driver missing: .*`bft-megatron doctor`"):
        preflight(replace(recipe, device="auto"), config, world=8, per_node=0)


def test_layers_that_are_not_installed(recipe: Recipe, config: ModelConfig):
    with pytest.raises(FieldError, match="Transformer Engine is not installed"):
        preflight(replace(recipe, device="auto", layers="transformer_engine"), config, world=8, per_node=4)


def test_disk_and_memory(recipe: Recipe, config: ModelConfig, tmp_path: Path):
    """Three checkpoints of 405B are some 17 TB; a hundred thousand ranks of a small model want too much memory."""
    large = replace(config, layers=126, hidden=16384, ffn=53248)
    with pytest.raises(UserError, match=rf"{tmp_path}: has .* GiB free, the run needs [\d,]+ GiB: it keeps up to 2"):
        preflight(recipe, large, world=8, per_node=4)
    with pytest.raises(UserError, match=r"GiB of memory; a save gathers [\d,]+ GiB of optimizer state"):
        preflight(recipe, config, world=8, per_node=100_000_000)


def test_memory_for_experts_is_by_their_own_layout(recipe: Recipe, config: ModelConfig):
    """On one node: too many ranks for a save where each holds every expert, and not where each holds an eighth."""
    mixture = replace(config, experts=Experts(count=64, per_token=2, ffn=512, scores="softmax of all"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    ranks = 2 * memory // (OPTIMIZER_BYTES * parameter_count(mixture))
    layouts = [replace(recipe, parallel=replace(recipe.parallel, tensor=1, expert=expert)) for expert in (1, 8)]
    with pytest.raises(UserError, match=r"has .* of memory; .* Raise parallel\.expert, tensor or pipeline"):
        preflight(layouts[0], mixture, world=8, per_node=ranks)
    preflight(layouts[1], mixture, world=8, per_node=ranks)


def test_room_on_disk_counts_what_is_there(undisturbed: Path, config: ModelConfig, tmp_path: Path):
    """The disk has room for two checkpoints and a half; the run keeps three and writes one more."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    size = shutil.disk_usage(tmp_path).free / 2.5 / CHECKPOINT_BYTES
    small, large = (parameter_count(replace(config, ffn=ffn)) for ffn in (1024, 2048))
    model = replace(config, ffn=1024 + int((size - small) / (large - small) * 1024))
    recipe = reader.load(
        out / "config.yaml", [f"output={out}", "device=cpu", "parallel.tensor=4", "parallel.pipeline=4"]
    )
    checkpoint = RunFolder(out).checkpoint
    preflight(recipe, model, world=16, per_node=1)  # it is finished
    checkpoint(6).rename(tmp_path / "elsewhere")
    preflight(recipe, model, world=16, per_node=1)
    checkpoint(4).rename(RunFolder(out).checkpoints / "damaged_iter_0000004")
    with pytest.raises(
        UserError, match=rf"{out}: has .* free, .*: it keeps up to 3 .* and writes one more, 1 are ther"
    ):
        preflight(recipe, model, world=16, per_node=1)
