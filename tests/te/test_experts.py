"""A GPU's experts, one module each or grouped in one, hold, load, save and export what the CPU's do."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.export import export
from bft_megatron.hf.weights import weights
from bft_megatron.recipe.schema import DataSettings, Recipe
from bft_megatron.training import kernels
from bft_megatron.training.initialize import GPU_FLAGS, device_flags
from bft_megatron.upstream import cuda_on_cpu
from tests.helpers import sharded
from tests.helpers.exported import assert_same, tensors
from tests.helpers.sharded import TRANSFORMER_ENGINE, Sharding
from tests.helpers.tiny_models import SavedModel
from tests.helpers.world import run_world
from tests.te.test_layer_spec import contents

LAYOUTS = [
    (Sharding(), ()),
    (Sharding(tp=2, ep=2), ("--sequence-parallel",)),
    (Sharding(tp=2, etp=2), ("--sequence-parallel",)),
    (Sharding(pp=2, dp=2, ep=2), ()),
]
EXPERTS = {"sequential": (), "grouped": ("--moe-grouped-gemm",)}


@pytest.mark.parametrize(("layout", "sequence"), LAYOUTS, ids=str)
def test_parameters_and_checkpoint_keys_are_those_of_the_cpu(
    layout: Sharding, sequence: tuple[str, ...], mixtures: list[SavedModel]
):
    folders = [m.folder for m in mixtures]
    cpu = run_world(layout.world, contents, folders, layout, sequence, megatron=True)
    for grouped in EXPERTS.values():
        flags = (*sequence, *TRANSFORMER_ENGINE, *grouped)
        engine = run_world(layout.world, contents, folders, layout, flags, megatron=True)
        for expected_rank, rank in zip(cpu, engine, strict=True):
            for expected, found in zip(expected_rank, rank, strict=True):
                assert_same(expected["parameters"], found["parameters"])
                assert expected["stored"] == found["stored"]


@pytest.mark.parametrize("experts", EXPERTS)
def test_every_parameter_is_in_the_table(mixtures: list[SavedModel], experts: str):
    flags = (*TRANSFORMER_ENGINE, *EXPERTS[experts])
    [found] = run_world(1, contents, [m.folder for m in mixtures], Sharding(), flags, megatron=True)
    for model, of_model in zip(mixtures, found, strict=True):
        wanted = {w.path for w in weights(read_config(model.folder)) if not w.buffer}
        assert of_model["parameters"].keys() == wanted


def _kinds(folder: Path, flags: tuple[str, ...]) -> set[str]:
    with sharded.model(folder, Sharding(), flags=(*TRANSFORMER_ENGINE, *flags)) as (chunk,):
        return {type(module).__name__ for module in chunk.decoder.layers[-1].mlp.experts.modules()}


@pytest.mark.parametrize(
    ("experts", "kinds"),
    [
        ("sequential", {"SequentialMLP", "ModuleList", "MLP", "TEColumnParallelLinear", "TERowParallelLinear"}),
        ("grouped", {"TEGroupedMLP", "TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"}),
    ],
)
def test_experts_are_transformer_engines(mixtures: list[SavedModel], experts: str, kinds: set[str]):
    for model in mixtures:
        [found] = run_world(1, _kinds, model.folder, EXPERTS[experts], megatron=True)
        assert found == kinds


@pytest.mark.parametrize("experts", EXPERTS)
def test_load_then_export_is_bit_identical(mixtures: list[SavedModel], tmp_path: Path, experts: str):
    layout, saved = Sharding(tp=2, pp=2, ep=2), {m.folder: tmp_path / m.name for m in mixtures}
    flags = (*TRANSFORMER_ENGINE, "--sequence-parallel", *EXPERTS[experts])
    run_world(layout.world, partial(sharded.save_loaded, saved, layout, flags=flags), megatron=True)
    for folder, checkpoints in saved.items():
        export(checkpoints, tmp_path / "out" / folder.name, folder)
        assert_same(tensors(folder), tensors(tmp_path / "out" / folder.name))


def test_its_kernels_for_experts_are_used_by_models_with_experts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_on_cpu, "gpu_is_visible", lambda: True)
    recipe = Recipe(model="m", data=DataSettings(train="rows.jsonl"), output="run")
    assert kernels.expert_flags() == ["--moe-grouped-gemm", "--moe-permute-fusion"]
    assert kernels.missing(torch_layers=False, experts=True, delta_nets=False) == []
    assert device_flags(recipe, experts=True) == [*GPU_FLAGS, "--moe-grouped-gemm", "--moe-permute-fusion"]
    assert device_flags(recipe, experts=False) == GPU_FLAGS
