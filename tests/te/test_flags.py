"""Models under the flags that Transformer Engine obeys are built, and hold and save what they do without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from megatron.core.fp8_utils import get_fp8_context

from tests.helpers import sharded
from tests.helpers.exported import assert_same
from tests.helpers.sharded import TRANSFORMER_ENGINE, Sharding
from tests.helpers.tiny_models import SavedModel
from tests.helpers.world import run_world
from tests.te.test_layer_spec import contents

FP8 = ("--fp8-format", "hybrid")
ENDS = ("--first-last-layers-bf16", "--num-layers-at-start-in-bf16", "1", "--num-layers-at-end-in-bf16", "1")
DENSE = {
    "delayed": (*FP8, "--fp8-amax-history-len", "16", "--fp8-amax-compute-algo", "max", "--fp8-margin", "1"),
    "tensorwise": (*FP8, "--fp8-recipe", "tensorwise", *ENDS),
    "blockwise": (*FP8, "--fp8-recipe", "blockwise", "--no-fp8-wgrad"),
    "mxfp8": ("--fp8-format", "e4m3", "--fp8-recipe", "mxfp8", *ENDS),
    "nvfp4": ("--fp4-format", "e2m1"),
    "attention": ("--attention-backend", "flash", "--fused-residual-rmsnorm"),
}
EXPERTS = {
    "fused": ("--moe-grouped-gemm", "--moe-permute-fusion", "--moe-router-fusion"),
    "fp8": (*FP8, "--fp8-recipe", "blockwise", "--moe-grouped-gemm", "--moe-permute-fusion"),
    "fp8 one after the other": (*FP8, "--fp8-recipe", "tensorwise"),
}


def _assert_as_without(models: list[SavedModel], layout: Sharding, flags: tuple[str, ...]) -> None:
    folders = [m.folder for m in models]
    plain, flagged = (
        run_world(layout.world, contents, folders, layout, (*TRANSFORMER_ENGINE, *given), megatron=True)
        for given in ((), flags)
    )
    for expected_rank, rank in zip(plain, flagged, strict=True):
        for expected, found in zip(expected_rank, rank, strict=True):
            assert_same(expected["parameters"], found["parameters"])
            assert expected["stored"] == found["stored"]


@pytest.mark.parametrize("name", DENSE)
def test_of_dense_models(name: str, models: list[SavedModel]):
    _assert_as_without(models[:1], Sharding(tp=2, pp=2), DENSE[name])


@pytest.mark.parametrize("name", EXPERTS)
def test_of_models_with_experts(name: str, mixtures: list[SavedModel]):
    _assert_as_without(mixtures[:1], Sharding(pp=2, dp=2, ep=2), EXPERTS[name])


@pytest.mark.parametrize("kinds", [("all_gather",), ("a2a",), ("p2p", "p2p", "a2a", "a2a")], ids="-".join)
def test_ways_of_context_parallelism_reach_the_attention(kinds: tuple[str, ...], models: list[SavedModel]):
    [found] = run_world(1, _ways, models[0].folder, ("--cp-comm-type", *kinds), megatron=True)
    assert len(found) == 4
    assert found == [*kinds] * (1 if len(kinds) > 1 else 4)


def _ways(folder: Path, flags: tuple[str, ...]) -> list[Any]:
    def as_under_context_parallelism(gpt: Any) -> None:
        gpt.context_parallel_size = 2

    given = (*TRANSFORMER_ENGINE, *flags)
    with sharded.model(folder, Sharding(), flags=given, adapt=as_under_context_parallelism) as (chunk,):
        return [layer.self_attention.core_attention.cp_comm_type for layer in chunk.decoder.layers]


def test_the_first_and_the_last_layers_stay_in_bf16(models: list[SavedModel]):
    assert run_world(1, _in_bf16, models[0].folder, megatron=True) == [[True, False, False, True]]


def _in_bf16(folder: Path) -> list[bool]:
    with sharded.model(folder, Sharding(), flags=(*TRANSFORMER_ENGINE, *DENSE["tensorwise"])) as (chunk,):
        layers = range(chunk.config.num_layers)
        return [type(get_fp8_context(chunk.config, k)).__name__ == "nullcontext" for k in layers]
