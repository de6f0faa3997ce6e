"""The tiny versions of LLaMA-Factory's own examples run, and follow its trainer's learning rates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import get_scheduler

from bft_megatron import checks, recipe, rows
from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.hub import find_model
from bft_megatron.llamafactory import convert, recipe_text
from bft_megatron.output import RunFolder
from bft_megatron.recipe import Recipe
from tests.layouts.runs import MODEL, _train, read_metrics
from tests.test_cli import ROOT
from tests.world import run_world

CONFIGS = Path(__file__).parent / "configs"

# name -> iterations, warm-up of LLaMA-Factory's own trainer
EXAMPLES = {"full": (24, 3), "lora": (3, 1), "megatron_bridge": (6, 2)}


def tiny(name: str, folder: Path) -> Recipe:
    """The converted recipe with the tiny model in place of its own."""
    (folder / "recipe.yaml").write_text(recipe_text(convert(CONFIGS / f"{name}.yaml")))
    made = recipe.load(
        folder / "recipe.yaml",
        [f"model={MODEL}", "init=random", "train.precision=fp32", "train.save_every=null", f"output={folder / 'run'}"],
    )
    checks.check_recipe(made, read_config(find_model(made.model)))
    return made


@pytest.mark.parametrize("name", EXAMPLES)
def test_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    made = tiny(name, tmp_path)
    prepared = rows.prepare_rows(made, MODEL, read_config(MODEL).vocab_size)
    run_world(1, _train, made, prepared, lambda: None, megatron=True)
    train, valid = read_metrics(RunFolder.of(made).metrics)
    steps, warmup = EXAMPLES[name]
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=made.train.lr)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    expected = []
    for _ in range(steps):
        expected += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert len(train) == steps
    print(name, [l["lr"] for l in train], expected, valid)
