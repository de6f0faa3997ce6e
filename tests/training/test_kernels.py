"""Where Transformer Engine has no kernel for experts a run does without it and says what that costs."""

from __future__ import annotations

import pytest

from bft_megatron.training import kernels
from bft_megatron.training.initialize import CPU_FLAGS, TORCH_LAYER_FLAGS, device_flags


def test_no_kernel_is_asked_for_that_is_not_there():
    """The tests' own environment has no Transformer Engine: Megatron stands for its kernels with None."""
    assert kernels.expert_flags() == []
    assert device_flags(False, experts=True) == TORCH_LAYER_FLAGS
    assert device_flags(True, experts=True) == CPU_FLAGS


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
    assert said.startswith("flash-linear-attention is not installed: gated delta nets are computed by torch")
