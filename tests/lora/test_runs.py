"""Runs with adapters: the same numbers on every layout, only the adapters saved, merged as B A by hand."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from bft_megatron.errors import UserError
from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.load import _Random
from bft_megatron.hf.tensors import HFTensor
from bft_megatron.lora.base import check_base, record_base
from bft_megatron.lora.peft import export_adapter, export_merged
from bft_megatron.recipe import reader
from bft_megatron.run.folder import RunFolder
from tests.helpers.commands import command, run_command
from tests.helpers.runs import MODEL, read_metrics

LAYOUTS = {"one": [], "two": ["parallel.tensor=2", "parallel.pipeline=2"]}
LORA = "lora={rank: 4, alpha: 8}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    folder = tmp_path_factory.mktemp("lora")
    for name, layout in LAYOUTS.items():
        steps = ["train.iterations=3", "train.lr=1e-2", LORA, f"output={folder / name}"]
        with pytest.MonkeyPatch.context() as patch:
            assert run_command(patch, "train", "recipes/tiny.yaml", *steps, *layout) == 0
    return {name: RunFolder(folder / name) for name in LAYOUTS}


def test_the_same_numbers_under_tensor_pipeline_and_sequence_parallelism(runs: dict[str, RunFolder]):
    one, two = (read_metrics(runs[name].metrics)[0] for name in LAYOUTS)
    for expected, line in zip(one, two, strict=True):
        assert line == pytest.approx(expected, rel=1e-5)


def test_the_checkpoint_holds_the_adapters_alone(runs: dict[str, RunFolder]):
    reader = dcp.FileSystemReader(runs["two"].checkpoints / "iter_0000003")
    stored = [k for k, v in reader.read_metadata().state_dict_metadata.items() if hasattr(v, "size")]
    assert stored
    assert all("adapter" in name or "lora" in name for name in stored)


def test_merging_adds_b_times_a(runs: dict[str, RunFolder], tmp_path: Path):
    made = reader.load(runs["two"].config)
    export_adapter(runs["two"], made, tmp_path / "adapter")
    export_merged(runs["two"], made, tmp_path / "merged")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    base = _Random(read_config(MODEL), made.train.seed)
    for name, value in merged.items():
        prefix = "base_model.model." + name.removesuffix(".weight")
        expected = base(HFTensor(name, tuple(value.shape)), None, 0, 0)
        if f"{prefix}.lora_A.weight" in adapter:
            a, b = adapter[f"{prefix}.lora_A.weight"], adapter[f"{prefix}.lora_B.weight"]
            assert b.abs().max() > 0
            expected = expected + 2 * b @ a
        torch.testing.assert_close(value, expected)


@pytest.mark.slow
def test_a_finished_run_asked_for_more_steps_says_the_way_on(runs: dict[str, RunFolder], tmp_path: Path):
    """The way is gone: the new run begins with the adapters that the finished one ended with."""
    finished, adapter = runs["two"], tmp_path / "adapter"
    words = ["train", "recipes/tiny.yaml", "train.lr=1e-2", *LAYOUTS["two"]]
    refused = command(*words, "train.iterations=5", LORA, f"output={finished.root}")
    assert "to train its adapters further, export them and set lora.adapter to their folder" in refused.stderr
    assert command("export", finished.root, adapter).returncode == 0
    further = ["train.iterations=3", f"lora={{rank: 4, alpha: 8, adapter: {adapter}}}", f"output={tmp_path / 'more'}"]
    with pytest.MonkeyPatch.context() as patch:
        assert run_command(patch, *words, *further) == 0
    ended, begun = read_metrics(finished.metrics)[1][-1], read_metrics(RunFolder(tmp_path / "more").metrics)[1][0]
    assert (begun["iteration"], ended["iteration"]) == (0, 3)
    for name in ("loss", "lm_loss", "mean_p", "mean_confidence", "tokens"):
        assert begun[name] == pytest.approx(ended[name], rel=1e-5), name


def test_a_base_without_its_record_is_said_and_a_damaged_record_is_refused(
    runs: dict[str, RunFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = RunFolder(tmp_path / "run")
    shutil.copytree(runs["one"].root, run.root)
    recipe, config, record = reader.load(run.config), read_config(MODEL), run.base.read_text()
    for damage in ("", "{", "{}", "[]", '{"fingerprint": null}'):
        run.base.write_text(damage)
        with pytest.raises(UserError, match=str(run.base)):
            check_base(run, recipe, config, MODEL)
    run.base.unlink()
    check_base(run, recipe, config, MODEL)
    record_base(run, recipe, config, MODEL)
    assert capsys.readouterr().out.startswith(f"{run.base} is missing: nothing tells whether")
    assert run.base.read_text() == record
    with pytest.raises(UserError, match="are not those that this run's adapters were trained on"):
        check_base(run, replace(recipe, train=replace(recipe.train, seed=2)), config, MODEL)
