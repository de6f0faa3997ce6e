"""Every factor's gradient on a layout is that of `peft` over transformers in float64; the adapter is `peft`'s own."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.hub import find_model
from bft_megatron.lora.factors import adapted, all_factors, in_files
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.folder import RunFolder
from bft_megatron.run.prepared import prepare_rows
from tests.helpers import model_reference as reference
from tests.helpers.runs import Case, Layout, make_recipe, read_metrics, train_rank
from tests.helpers.world import run_world

SETTINGS = {"r": 4, "lora_alpha": 8}


def make(folder: Path, data: Path, model: str, layout: Layout, *words: str) -> Recipe:
    lora = f"lora={{rank: 4, alpha: 8, adapter: {data / f'{model}-adapter'}}}"
    return make_recipe(folder, data, Case(model=model), layout, 1, lora, *words)


def with_adapter(folder: Path, model: torch.nn.Module) -> torch.nn.Module:
    """peft's model with random factors, which are saved too."""
    torch.manual_seed(3)
    made = peft.get_peft_model(
        model.float(), peft.LoraConfig(**SETTINGS, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    made.save_pretrained(folder)
    return made.double()


def gradients(made: Recipe) -> dict[str, Tensor]:
    """Of step 1, out of Adam's first moment, by peft's names."""
    reader, prefix = dcp.FileSystemReader(RunFolder.of(made).checkpoint(1)), "optimizer.state.exp_avg."
    factors = all_factors(adapted(read_config(find_model(made.model)), made.lora))
    moments = {prefix + f.name: torch.empty(f.tensors[0].shape) for f in factors}
    dcp.load(moments, storage_reader=reader, no_dist=True)
    found = {}
    for whole, parts in in_files(factors).items():
        gradient = torch.full(whole.shape, torch.nan)
        for part, _ in parts:
            part.tensors[0].put(moments[prefix + part.name] / (1 - made.train.adam_beta1), gradient)
        found[f"base_model.model.{whole.name.removesuffix('weight')}default.weight"] = gradient
    return found


def run(made: Recipe, world: int) -> dict[str, Tensor]:
    prepared = prepare_rows(made, find_model(made.model), read_config(find_model(made.model)).vocab_size)
    run_world(world, train_rank, made, prepared, lambda: None, megatron=True)
    return gradients(made)


RECOMPUTE = [f"megatron.recompute-{name}" for name in ("granularity=full", "method=uniform", "num-layers=1")]
CASES = {
    "tiny": [(Layout(), RECOMPUTE), (Layout(tensor=2, pipeline=2, sequence=True), [])],
    "qwen3": [(Layout(tensor=2, data=2), [])],
}
"""Full recompute: behind a frozen embedding it would leave the first layer without a gradient."""


SLOW = {
    "hybrid": [
        (Layout(tensor=2, sequence=True), RECOMPUTE),
        (Layout(pipeline=2, virtual_pipeline=2), []),
        (Layout(context=4), []),
        (Layout(tensor=2, sequence=True, pipeline=2, context=2), []),
    ],
}


@pytest.mark.parametrize("model", CASES)
def test_gradients_are_those_of_peft(model: str, data: Path, tmp_path: Path):
    compare(model, data, tmp_path, CASES[model])


@pytest.mark.slow
@pytest.mark.parametrize("model", SLOW)
def test_gradients_are_those_of_peft_on_every_layout(model: str, data: Path, tmp_path: Path):
    compare(model, data, tmp_path, SLOW[model])


def compare(model: str, data: Path, tmp_path: Path, layouts: list[tuple[Layout, list[str]]]) -> None:
    base = make(tmp_path / "expected", data, model, Layout())
    expected = reference.first_step(base, adapt=partial(with_adapter, data / f"{model}-adapter"))
    for i, (layout, words) in enumerate(layouts):
        made = make(tmp_path / str(i), data, model, layout, *words)
        found = run(made, layout.world)
        assert found.keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            assert gradient.abs().max() > 0
            assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), (str(layout), name)
        [line] = read_metrics(RunFolder.of(made).metrics)[0]
        assert line["grad_norm"] == pytest.approx(expected.train[0]["grad_norm"], rel=1e-5)
        assert line["loss"] == pytest.approx(expected.train[0]["loss"], rel=1e-5)
