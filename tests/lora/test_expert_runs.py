"""Runs with adapters on experts and delta nets: resumed on another layout, exported, merged, begun with."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.load import _Random
from bft_megatron.hf.weights import places
from bft_megatron.lora.peft import PREFIX, WEIGHTS, export_adapter, export_merged
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.folder import RunFolder
from tests.helpers import model_reference as reference
from tests.helpers.comparing import differences
from tests.helpers.runs import Case, Layout, Result, make_recipe
from tests.lora.test_experts import run

STEPS, SAVED = 2, 1
FIRST = Layout(tensor=2, sequence=True, expert=2)


def recipe(folder: Path, data: Path, layout: Layout, lora: str = "", model: str = "qwen3_moe") -> Recipe:
    words = [f"train.save_every={SAVED}", "train.validate_every=1", "train.clip_grad=1.0", "train.lr=1e-2"]
    words.append("train.global_batch_size=4")
    words.append(f"lora={{rank: 4, alpha: 8{lora}}}")
    return make_recipe(folder, data, Case(model=model, pad_multiple=4), layout, STEPS, *words)


@pytest.fixture(scope="module")
def first(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Result]:
    made = recipe(tmp_path_factory.mktemp("first") / "run", data, FIRST)
    return made, run(made, FIRST.world)


def resumed(whole: RunFolder, made: Recipe, layout: Layout) -> Result:
    """What a run reports that goes on after step 1 of another."""
    shutil.copytree(whole.root, made.output)
    own = RunFolder.of(made)
    shutil.rmtree(own.checkpoint(STEPS))
    (own.root / "done").unlink()
    own.write_tracker(SAVED)
    return run(made, layout.world)


def assert_resumes(first: tuple[Recipe, Result], made: Recipe, layout: Layout, began: Layout = FIRST) -> None:
    whole, expected = first
    found = resumed(RunFolder.of(whole), made, layout)
    assert [line["iteration"] for line in found.train] == [1, 2]
    off = differences(found, expected)
    worst = max(off, key=lambda name: off[name])
    assert off[worst] <= (0 if layout == began else 1e-5), worst


def test_a_run_goes_on_with_another_number_of_optimizers(first: tuple[Recipe, Result], data: Path, tmp_path: Path):
    assert_resumes(first, recipe(tmp_path / "run", data, Layout()), Layout())


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        FIRST,
        Layout(data=2, expert=2),
        Layout(tensor=2, sequence=True, expert_tensor=2),
        Layout(tensor=2, sequence=True, data=2, expert=2, expert_tensor=2),
        Layout(pipeline=2, data=2, expert=2),
        Layout(context=2, data=2, expert=4),
    ],
    ids=str,
)
def test_a_run_goes_on_on_any_layout(layout: Layout, first: tuple[Recipe, Result], data: Path, tmp_path: Path):
    assert_resumes(first, recipe(tmp_path / "run", data, layout), layout)


def test_out_merged_and_in_again(first: tuple[Recipe, Result], data: Path, tmp_path: Path):
    """peft over transformers, the merged model alone, and a run that begins with the adapters compute the same."""
    made, ended = first
    layout = Layout(data=2, expert=2)
    again = recipe(tmp_path / "again", data, layout, f", adapter: {tmp_path / 'adapter'}")
    assert_goes_out_and_in(made, ended, again, layout, tmp_path)


HYBRIDS = {
    "hybrid": (Layout(tensor=2, sequence=True), [Layout(), Layout(context=2)]),
    "hybrid_moe": (FIRST, [Layout(pipeline=2, data=2, expert=2)]),
    "next": (FIRST, [Layout(), Layout(pipeline=2, data=2, expert=2)]),
}
"""Where a run begins, and where it goes on."""


@pytest.mark.slow
@pytest.mark.parametrize("model", HYBRIDS)
def test_a_run_of_a_hybrid_goes_on_out_merged_and_in_again(model: str, data: Path, tmp_path: Path):
    began, others = HYBRIDS[model]
    made = recipe(tmp_path / "run", data, began, model=model)
    first = made, run(made, began.world)
    for layout in (began, *others):
        assert_resumes(first, recipe(tmp_path / str(layout), data, layout, model=model), layout, began)
    again = recipe(tmp_path / "again", data, others[0], f", adapter: {tmp_path / 'adapter'}", model)
    assert_goes_out_and_in(made, first[1], again, others[0], tmp_path)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    adapter, draw = load_file(tmp_path / "adapter" / WEIGHTS), _Random(read_config(data / model), made.train.seed)
    for tensor in places(read_config(data / model)):
        value, factors = draw(tensor, None, 0, 0), f"{PREFIX}{tensor.name.removesuffix('weight')}lora_"
        if f"{factors}A.weight" in adapter:
            value = value + 2.0 * (adapter.pop(f"{factors}B.weight") @ adapter.pop(f"{factors}A.weight"))
        assert torch.equal(merged[tensor.name], value), tensor.name
    assert not adapter


def assert_goes_out_and_in(made: Recipe, ended: Result, again: Recipe, layout: Layout, tmp_path: Path) -> None:
    RunFolder.of(made).model.mkdir()
    shutil.copyfile(Path(made.model) / "config.json", RunFolder.of(made).model / "config.json")
    export_adapter(RunFolder.of(made), made, tmp_path / "adapter")
    export_merged(RunFolder.of(made), made, tmp_path / "merged")
    base = reference.whole_model(made)
    plain = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float64}
    state = load_file(tmp_path / "merged" / "model.safetensors")
    merged = type(base).from_pretrained(None, config=base.config, state_dict=state, **plain)
    with_adapter = logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").double())
    assert_close(logits(merged), with_adapter)
    assert (with_adapter - logits(reference.whole_model(made))).abs().max() > 0.01 * with_adapter.abs().max()
    begun, last = run(again, layout.world).valid[0], [line for line in ended.valid if line["split"] == "valid"][-1]
    for name in ("loss", "lm_loss", "mean_p", "mean_confidence", "tokens"):
        assert begun[name] == pytest.approx(last[name], rel=1e-5), name


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    ids = torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids).logits


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
