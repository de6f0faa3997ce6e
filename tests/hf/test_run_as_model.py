"""A run's folder as the `model:` of another run: its newest checkpoint's weights, on any layout."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from bft_megatron.hf.export import export
from bft_megatron.run.folder import RunFolder
from tests.helpers.runs import MODEL, Case, Layout, make_recipe, run, write_data


def test_a_run_starts_from_the_weights_that_another_one_ended_with(tmp_path: Path):
    write_data(tmp_path)
    first = make_recipe(tmp_path / "first", tmp_path, Case(), Layout(tensor=2), 2)
    run(first, 2)
    RunFolder.of(first).write_config(first, MODEL)
    # A step that changes nothing.
    still = ("init=pretrained", f"model={tmp_path / 'first'}", "train.lr=1e-30", "train.min_lr=0")
    second = make_recipe(tmp_path / "second", tmp_path, Case(), Layout(pipeline=2), 1, *still)
    run(second, 2)
    weights = {}
    for made in (first, second):
        folder = RunFolder.of(made)
        export(folder.checkpoints, tmp_path / f"{folder.root.name}-hf", MODEL)
        weights[folder.root.name] = load_file(tmp_path / f"{folder.root.name}-hf" / "model.safetensors")
    assert weights["first"].keys() == weights["second"].keys()
    assert all(torch.equal(weights["second"][name], value) for name, value in weights["first"].items())
