"""What is looked at on every node before the ranks of a batch job start."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from bft_megatron.commands.preflight import preflight
from bft_megatron.errors import FieldError, UserError
from bft_megatron.hf.architectures import ModelConfig, read_config
from bft_megatron.recipe import reader
from bft_megatron.recipe.schema import Recipe
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


def test_disk_and_memory(recipe: Recipe, config: ModelConfig, tmp_path: Path):
    """Three checkpoints of 405B are some 17 TB; a hundred thousand ranks of a small model want too much memory."""
    large = replace(config, layers=126, hidden=16384, ffn=53248)
    with pytest.raises(UserError, match=rf"{tmp_path}.*GiB free; the checkpoints to keep and one more take [\d,]+ GiB"):
        preflight(recipe, large, world=8, per_node=4)
    with pytest.raises(UserError, match=r"GiB of memory; a save gathers [\d,]+ GiB of optimizer state"):
        preflight(recipe, config, world=8, per_node=100_000_000)
