"""torch's CUDA surface on the CPU: every declared name is redirected, and Megatron still needs it to be."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from bft_megatron.upstream import cuda_on_cpu
from tests.helpers.world import run_world


def test_every_redirection_is_declared_and_made():
    stand_ins = cuda_on_cpu._stand_ins(torch.device("cpu"))
    assert stand_ins.keys() == {change.target for change in cuda_on_cpu.REDIRECTED}


def _redirected() -> dict[str, Any]:
    cuda_on_cpu.install()  # a second time: the world has done it
    x = torch.ones(2, device="cuda", pin_memory=True)
    stream, event = torch.cuda.Stream(), torch.cuda.Event()
    event.record(stream)
    stream.wait_event(event)
    with torch.cuda.stream(stream):
        torch.cuda.synchronize()
    torch.cuda.manual_seed(7)
    state, drawn = torch.cuda.get_rng_state(), torch.rand(2)
    torch.cuda.set_rng_state(state)
    return {
        "devices": {str(y.device) for y in (x, x.cuda(), x.to("cuda:0"), x.pin_memory(), torch.zeros(1).to("cuda"))},
        "types": (x.type(), x.bfloat16().type()),
        "again": torch.equal(drawn, torch.rand(2)),
        "seen": (torch.cuda.is_available(), torch.cuda.current_device(), cuda_on_cpu.gpu_is_visible()),
        "counts": (torch.cuda.memory_allocated(), torch.cuda.memory_stats()["any"], event.query()),
    }


def test_tensors_streams_and_random_states_are_the_cpus():
    [found] = run_world(1, _redirected, megatron=True)
    assert found == {
        "devices": {"cpu"},
        "types": ("torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor"),
        "again": True,
        "seen": (True, torch.device("cpu"), False),
        "counts": (0, 0, True),
    }


def test_megatron_still_asks_for_what_is_answered():
    from megatron.core.datasets import utils
    from megatron.core.optimizer import optimizer
    from megatron.training import initialize

    assert "torch.cuda.FloatTensor" in inspect.getsource(optimizer.Float16OptimizerWithFloat16Params)
    assert "torch.cuda.is_available()" in inspect.getsource(initialize.initialize_megatron)
    assert "torch.cuda.device_count()" in inspect.getsource(initialize._initialize_distributed)
    assert "make" in inspect.getsource(utils.compile_helpers)
