"""Checkpoints of hybrids in bf16, some of whose parameters are fp32."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.hub import find_model
from bft_megatron.run.folder import RunFolder
from bft_megatron.run.prepared import prepare_rows
from tests.helpers.checkpoints import assert_same_tensors, tensors
from tests.helpers.runs import Case, Layout, do_nothing, make_recipe, train_rank, write_data
from tests.helpers.world import run_world


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hybrids")
    write_data(folder)
    return folder


def _run(data: Path, folder: Path, layout: Layout) -> RunFolder:
    """Train two steps in bf16, from the newest checkpoint of the folder."""
    made = make_recipe(folder, data, Case(model="hybrid"), layout, 2, "train.precision=bf16", "train.clip_grad=1")
    model = find_model(made.model)
    prepared = prepare_rows(made, model, read_config(model).vocab_size)
    run_world(layout.world, train_rank, made, prepared, do_nothing, megatron=True)
    return RunFolder.of(made)


def test_a_resumed_run_is_the_same_to_the_bit(data: Path):
    run = _run(data, data / "run", Layout(data=2))
    shutil.copytree(data / "run", data / "resumed")
    (data / "resumed" / "done").unlink()
    shutil.rmtree(RunFolder(data / "resumed").checkpoint(2))
    RunFolder(data / "resumed").write_tracker(1)
    again = _run(data, data / "resumed", Layout(data=2))
    assert_same_tensors(again.checkpoint(2), run.checkpoint(2))
    kept = {name for name, x in tensors(run.checkpoint(2)).items() if "A_log" in name and x.dtype == torch.float32}
    assert any(not name.startswith("optimizer.") for name in kept)
