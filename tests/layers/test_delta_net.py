"""The parameters of a gated delta net that stay fp32, whatever is done to the module that holds them."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from bft_megatron.layers.delta_net import HeadNorm


class Holder(torch.nn.Module):
    """A head norm with values that bf16 cannot hold, and a layer beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.out_norm = HeadNorm(SimpleNamespace(), 5)
        self.out_norm.weight.data = torch.linspace(0.1, 1.3, 5)
        self.out_proj = torch.nn.Linear(5, 5)


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to("cpu", torch.bfloat16), lambda m: m.bfloat16().float()],
)
def test_a_cast_to_16_bits_passes_it_over(cast):
    module = Holder()
    before = copy.deepcopy(module)
    parameter = module.out_norm.weight
    cast(module)
    assert module.out_norm.weight is parameter
    assert module.out_norm.weight.dtype == torch.float32
    assert module.out_norm.weight.equal(before.out_norm.weight)
    assert not module.out_proj.weight.equal(before.out_proj.weight)


def test_other_casts_and_devices_are_as_of_any_module():
    module = Holder()
    assert module.double().out_norm.weight.dtype == torch.float64
    module.float().to("meta")
    assert module.bfloat16().out_norm.weight.dtype == torch.float32
    assert module.out_norm.weight.is_meta
    assert not module.to_empty(device="cpu").out_norm.weight.is_meta
    assert module.out_norm.weight.dtype == torch.float32
    assert module.out_proj.weight.dtype == torch.bfloat16
