"""A plan of a CPU run is what torch's allocator and the collectives of real gloo processes say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.hub import find_model
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.prepared import prepare_rows
from tests.helpers.runs import MODEL, Case, Layout, make_recipe
from tests.plan import truth

LAYOUTS = {
    "tp2-sp": Layout(tensor=2, sequence=True),
    **{
        name: pytest.param(layout, marks=pytest.mark.plan)
        for name, layout in {
            "one": Layout(),
            "tp2": Layout(tensor=2),
            "pp2": Layout(pipeline=2),
            "pp2-vpp2": Layout(pipeline=2, virtual_pipeline=2),
            "cp2": Layout(context=2),
            "dp2": Layout(data=2),
            "tp2-sp-cp2": Layout(tensor=2, sequence=True, context=2),
            "tp2-pp2": Layout(tensor=2, pipeline=2),
        }.items()
    },
}
ROW_BYTES = 5 * 8
"""Of a row's arrays, a token: they come from numpy, whose memory torch's allocator does not know. Each virtual stage
reads its own."""


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layout(layout: Layout, data: Path, tmp_path: Path):
    batch = max(2, layout.pipeline * layout.virtual_pipeline) * layout.data
    made = make_recipe(tmp_path, data, Case(), layout, 2, "device=cpu", f"train.global_batch_size={batch}")
    check(made, layout.world, [0] if layout.pipeline == 1 else [0, layout.world - 1])


EXPERT_LAYOUTS = {
    "dp2-ep2": pytest.param(Layout(data=2, expert=2), marks=pytest.mark.plan),
    "tp2-sp-etp2": pytest.param(Layout(tensor=2, sequence=True, expert_tensor=2), marks=pytest.mark.plan),
    "tp2-sp-ep2": pytest.param(Layout(tensor=2, sequence=True, expert=2), marks=pytest.mark.plan),
    "tp2-sp-dp2-ep2-etp2": pytest.param(
        Layout(tensor=2, sequence=True, data=2, expert=2, expert_tensor=2), marks=pytest.mark.plan
    ),
}


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS.values(), ids=EXPERT_LAYOUTS.keys())
def test_layout_of_experts(layout: Layout, data: Path, tmp_path: Path):
    """With equally many tokens for each expert."""
    batch = f"train.global_batch_size={2 * layout.data}"
    made = make_recipe(tmp_path, data, Case(model="qwen3_moe"), layout, 2, "device=cpu", batch)
    check(made, layout.world, [0])


HYBRID_LAYOUTS = {
    "one": pytest.param("hybrid", Layout(), marks=pytest.mark.plan),
    "tp2-sp": pytest.param("hybrid", Layout(tensor=2, sequence=True), marks=pytest.mark.plan),
    "cp2": pytest.param("hybrid", Layout(context=2), marks=pytest.mark.plan),
    "moe-dp2-ep2": pytest.param("hybrid_moe", Layout(data=2, expert=2), marks=pytest.mark.plan),
}


@pytest.mark.parametrize(("model", "layout"), HYBRID_LAYOUTS.values(), ids=HYBRID_LAYOUTS.keys())
def test_layout_of_hybrids(model: str, layout: Layout, data: Path, tmp_path: Path):
    """With the gated delta nets' kernels in torch."""
    batch = f"train.global_batch_size={2 * layout.data}"
    made = make_recipe(tmp_path, data, Case(model=model), layout, 2, "device=cpu", batch)
    check(made, layout.world, [0])


SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


@pytest.mark.plan
@pytest.mark.parametrize("layout", [Layout(tensor=3), Layout(pipeline=2)], ids=str)
def test_the_size_of_smollm2(layout: Layout, data: Path, tmp_path: Path):
    model = tmp_path / "smollm2"
    shutil.copytree(MODEL, model)
    config = json.loads((MODEL / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | SMOLLM2))
    options = ["device=cpu", f"model={model}", "data.valid=null", "train.global_batch_size=2"]
    made = make_recipe(tmp_path / "run", data, Case(), layout, 2, *options)
    check(made, layout.world, [layout.world - 1])


def check(made: Recipe, world: int, ranks: list[int]) -> None:
    """Hold these ranks' plans to what they really were."""
    model = find_model(made.model)
    config = read_config(model)
    prepared = prepare_rows(made, model, config.vocab_size)
    was = truth.real(made, config, prepared, world)
    for rank, plan in zip(ranks, truth.planned(made, config, prepared, world, ranks), strict=True):
        real = was[rank]
        for part in ("weights", "gradients", "optimizer", "saved"):
            assert getattr(plan, part) == pytest.approx(getattr(real, part), rel=0.05), part
        assert real.peak <= 1.15 * plan.peak
        assert real.peak >= plan.peak - ROW_BYTES * made.data.seq_length * made.parallel.virtual_pipeline
        assert plan.collectives == real.collectives
