"""The tiny versions of LLaMA-Factory's own examples run, and follow its trainer's learning rates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.hub import find_model
from bft_megatron.llamafactory import convert, recipe_text
from bft_megatron.recipe import reader, rules
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.folder import RunFolder
from bft_megatron.run.prepared import prepare_rows
from tests.helpers.commands import ROOT
from tests.helpers.runs import MODEL, read_metrics, train_rank
from tests.helpers.world import run_world

CONFIGS = Path(__file__).parent / "configs"

# name -> steps, those of them that warm up, samples of the whole run, sources that are reported apart
EXAMPLES = {
    "full": (8, 0.8, 16, {"identity", "questions"}),
    "lora": (6, 0.6, 18, set()),
    "megatron_bridge": (6, 2, None, set()),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    made = tiny(name, tmp_path)
    prepared = prepare_rows(made, MODEL, read_config(MODEL).vocab_size)
    run_world(1, train_rank, made, prepared, lambda: None, megatron=True)
    lines, _ = read_metrics(RunFolder.of(made).metrics)
    steps, warmup, samples, sources = EXAMPLES[name]
    assert [line["lr"] for line in lines] == pytest.approx(rates(made.train.lr, steps, warmup), rel=1e-9, abs=0)
    assert {source for line in lines for source in line.get("sources", ())} == sources
    assert samples in (None, sum(line["samples"] for line in lines))
    for line in lines:
        assert (line["loss"] < line["lm_loss"] / 10) == (made.objective.name != "sft")  # p is tiny, and 1 for sft
        assert (line["mean_weight"] < 1) == (made.objective.name == "bft")


def tiny(name: str, folder: Path) -> Recipe:
    """The converted recipe with the tiny model in place of its own."""
    (folder / "recipe.yaml").write_text(recipe_text(convert(CONFIGS / f"{name}.yaml")))
    overrides = [f"model={MODEL}", "init=random", "train.precision=fp32", f"output={folder / 'run'}"]
    made = reader.load(folder / "recipe.yaml", overrides)
    rules.check_recipe(made, read_config(find_model(made.model)))
    return made


def rates(peak: float, steps: int, warmup: float) -> list[float]:
    """The learning rate of each step, as transformers has them; a share of the steps is no whole number of them."""
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    found = []
    for _ in range(steps):
        found += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    return found
