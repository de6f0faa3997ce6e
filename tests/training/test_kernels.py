"""Where Transformer Engine has no kernel for experts a run does without it and says what that costs."""

from __future__ import annotations

import pytest

from bft_megatron.errors import FieldError
from bft_megatron.installation import layers
from bft_megatron.recipe.schema import DataSettings, Recipe
from bft_megatron.training import kernels
from bft_megatron.training.initialize import CPU_FLAGS, GPU_FLAGS, TORCH_LAYER_FLAGS, device_flags
from bft_megatron.upstream import cuda_on_cpu


def recipe(**fields: object) -> Recipe:
    return Recipe(model="m", data=DataSettings(train="rows.jsonl"), output="run", **fields)


def test_the_layers_are_those_that_the_recipe_names(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_on_cpu, "gpu_is_visible", lambda: True)
    monkeypatch.setattr(layers, "transformer_engine_is_there", lambda: True)
    assert device_flags(recipe(), experts=False) == GPU_FLAGS
    assert device_flags(recipe(layers="transformer_engine"), experts=False) == GPU_FLAGS
    assert device_flags(recipe(layers="torch"), experts=False) == TORCH_LAYER_FLAGS
    layers.check(recipe(layers="transformer_engine"))
    with pytest.raises(FieldError, match="device is cpu"):
        layers.check(recipe(layers="transformer_engine", device="cpu"))
    monkeypatch.setattr(layers, "transformer_engine_is_there", lambda: False)
    with pytest.raises(FieldError, match=f"{layers.INSTALL} installs it"):
        layers.check(recipe(layers="transformer_engine"))
    with pytest.raises(FieldError, match=f"gdn_norm_out needs .*{layers.INSTALL}"):
        layers.check(recipe(megatron={"recompute-modules": ["gdn_norm_out"]}))


def test_no_kernel_is_asked_for_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    """The tests' own environment has no Transformer Engine: Megatron stands for its kernels with None."""
    monkeypatch.setattr(cuda_on_cpu, "gpu_is_visible", lambda: True)
    assert kernels.expert_flags() == []
    assert device_flags(recipe(), experts=True) == TORCH_LAYER_FLAGS
    assert device_flags(recipe(device="cpu"), experts=True) == CPU_FLAGS


def test_what_is_missing_is_said_once_with_its_cost():
    old = kernels.missing(torch_layers=False, experts=True, delta_nets=False)
    assert [line.partition(",")[0] for line in old] == [
        "Transformer Engine lacks moe-grouped-gemm",
        "Transformer Engine lacks moe-permute-fusion",
    ]
    assert kernels.missing(torch_layers=False, experts=False, delta_nets=False) == []
    (dense,), (mixture,) = (
        kernels.missing(torch_layers=True, experts=experts, delta_nets=False) for experts in (False, True)
    )
    assert mixture.startswith(dense)
    assert "experts are multiplied one after the other" in mixture
    assert "experts" not in dense


@pytest.mark.parametrize("torch_layers", [False, True])
def test_what_gated_delta_nets_lack_is_said_with_either_kind_of_layers(torch_layers: bool):
    """The tests' own environment has neither a GPU nor flash-linear-attention."""
    without, with_nets = (
        kernels.missing(torch_layers=torch_layers, experts=False, delta_nets=nets) for nets in (False, True)
    )
    (said,) = [line for line in with_nets if line not in without]
    assert said.startswith("gated delta nets, as Qwen3.5 has them, are torch's")
