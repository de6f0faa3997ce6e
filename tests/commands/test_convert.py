"""A conversion holds the model to the bit; the export, another run and stock Megatron-LM take it, or a run's end."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from bft_megatron.hf.export import export
from bft_megatron.hf.hub import TRACKER
from bft_megatron.training.initialize import CPU_FLAGS
from bft_megatron.upstream import command_line
from tests.helpers import sharded, tiny_models
from tests.helpers.commands import run_command
from tests.helpers.exported import assert_same, tensors
from tests.helpers.tiny_models import SavedModel
from tests.helpers.world import run_world

RECIPE = """\
model: {model}
data: {{train: none.jsonl, seq_length: 24}}
train: {{iterations: 5, precision: fp32}}
device: cpu
parallel: {{tensor: 2}}
output: {out}
"""


@pytest.fixture
def recipe(models: list[SavedModel], tmp_path: Path) -> Path:
    """Of Qwen3: tied embeddings, norms in the heads. Its data do not exist, and nobody asks for them."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=models[3].folder, out=tmp_path / "out"))
    return path


def test_convert_then_export_is_bit_identical(
    recipe: Path, models: list[SavedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert run_command(monkeypatch, "convert", recipe) == 0
    assert (tmp_path / "out" / "checkpoints" / TRACKER).read_text() == "release"
    assert run_command(monkeypatch, "export", tmp_path / "out", tmp_path / "hf") == 0
    assert_same(tensors(models[3].folder), tensors(tmp_path / "hf"))

    # A run's checkpoints as the model of another conversion, and bare ones of Megatron's with the configuration beside.
    bare = shutil.copytree(tmp_path / "out" / "checkpoints", tmp_path / "bare")
    shutil.copyfile(models[3].folder / "config.json", bare / "config.json")
    for name in ("out", "bare"):
        again = tmp_path / f"{name}-again"
        words = (f"model={tmp_path / name}", f"output={again}", "parallel.tensor=1", "parallel.pipeline=2")
        assert run_command(monkeypatch, "train", recipe, "train.iterations=0", *words) == 0
        export(again / "checkpoints", tmp_path / f"{name}-hf", again / "model")
        assert_same(tensors(models[3].folder), tensors(tmp_path / f"{name}-hf"))

    for name in ("train", "convert"):  # a run in the same folder would begin with these weights, whatever its model
        assert run_command(monkeypatch, name, recipe) == 2


def _stock(checkpoints: Path, flags: list[str]) -> torch.Tensor | None:
    """Logits by Megatron's own parser, layers and loader, with nothing of ours but the CPU for a device."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron
    from megatron.training.models.gpt import GPTModelBuilder

    args = command_line.parse(
        ["--load", str(checkpoints), *flags, *sharded.RUN_FLAGS, *CPU_FLAGS, "--no-load-optim", "--no-load-rng"]
    )
    initialize_megatron()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    chunks = GPTModelBuilder(gpt_config_from_args(args)).build_distributed_models(groups, wrap_with_ddp=False)
    load_checkpoint(chunks, None, None)
    return sharded.logits([chunk.eval() for chunk in chunks])


def _assert_stock_megatron_computes(expected: torch.Tensor, out: Path, *flags: str) -> None:
    """From a run's checkpoints, on another layout, with the flags that Megatron does not take from a checkpoint."""
    words = ["--use-checkpoint-args", "--vocab-size", str(expected.shape[-1]), *flags]
    words += ["--pipeline-model-parallel-size", "2"]
    outputs = run_world(2, _stock, out / "checkpoints", words, megatron=True)
    error = (outputs[1][..., : expected.shape[-1]] - expected)[tiny_models.prompts()[1].bool()].abs().max()
    assert error < 1e-5 * expected.abs().max()


def test_stock_megatron_loads_it(
    recipe: Path, models: list[SavedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert run_command(monkeypatch, "convert", recipe) == 0
    _assert_stock_megatron_computes(models[3].logits, tmp_path / "out", "--norm-epsilon", "1e-6", "--qk-layernorm")


def test_stock_megatron_loads_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    words = ["device=cpu", "parallel.tensor=2", "parallel.data=1", "data.valid=null"]
    words += ["train.iterations=1", "train.warmup_iterations=0"]
    assert run_command(monkeypatch, "train", "recipes/tiny.yaml", f"output={out}", *words) == 0
    export(out / "checkpoints", tmp_path / "hf", out / "model")
    expected = tiny_models.logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf"))
    _assert_stock_megatron_computes(expected, out, "--norm-epsilon", "1e-5")


def test_what_cannot_be_converted(recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    assert run_command(monkeypatch, "convert", recipe, "lora.rank=4") == 2
    assert "a conversion writes the model's own weights" in capfd.readouterr().err
    os.makedirs(recipe.parent / "bare")
    (recipe.parent / "bare" / TRACKER).write_text("7")
    assert run_command(monkeypatch, "convert", recipe, f"model={recipe.parent / 'bare'}") == 2
    assert "which lack a tokenizer" in " ".join(capfd.readouterr().err.split())
