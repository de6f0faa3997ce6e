"""What goes wrong in Megatron's distributed optimizer with torch's Adam, and its writer's queue."""

from __future__ import annotations

import multiprocessing
import queue
from typing import Any

import pytest
import torch

from bft_megatron.upstream import checkpoint_writer
from tests.helpers.world import run_world
from tests.upstream.optimizers import build, saved, step


def _fails(call: Any, *args: Any) -> str | None:
    try:
        call(*args)
    except (AssertionError, KeyError, RuntimeError) as e:
        return f"{type(e).__name__}: {str(e).partition('.')[0]}"
    return None


def _step_counts(optimizer: Any) -> tuple[list[float], int]:
    """Adam's count of each parameter, and how many tensors hold them."""
    counts = [state["step"] for state in optimizer.optimizer.state.values()]
    return [float(count) for count in counts], len({id(count) for count in counts})


def _torch_adam() -> dict[str, Any]:
    ddp, optimizer = build()
    megatrons, found = type(optimizer), {}
    found["no state"] = _fails(megatrons.state_dict.__wrapped__, optimizer)
    found["no state, wrapped"] = _fails(optimizer.state_dict)
    for _ in range(2):
        step(ddp, optimizer)
    state = optimizer.state_dict()
    parameter = next(ddp.module.parameters())
    tensors = {key: saved(ddp, optimizer, key)[0] for key in ("param", "exp_avg", "exp_avg_sq")}
    set_states = megatrons._set_main_param_and_optimizer_states
    found["leaf"] = _fails(set_states, optimizer, parameter, tensors)
    found["no step"] = _fails(torch.no_grad()(set_states.__wrapped__), optimizer, parameter, tensors)
    found["no step, wrapped"] = _fails(torch.no_grad()(set_states), optimizer, parameter, tensors)
    megatrons.load_state_dict.__wrapped__(optimizer, state)
    found["loaded"] = _step_counts(optimizer)
    optimizer.load_state_dict(state)
    found["loaded, wrapped"] = _step_counts(optimizer)
    step(ddp, optimizer)
    found["next step, wrapped"] = _step_counts(optimizer)[0]
    return found


def test_a_resume_with_torchs_adam_goes_wrong_in_megatron_and_right_in_ours():
    [found] = run_world(1, _torch_adam, megatron=True)
    assert found["no state"] == "AssertionError: "
    assert found["no state, wrapped"] is None
    assert found["no step"] == "KeyError: 'step'"
    assert found["no step, wrapped"] is None
    assert found["leaf"].startswith("RuntimeError: a view of a leaf Variable that requires grad")  # without no_grad
    assert found["loaded"] == ([2, 2, 2], 1)  # shared: the next step would make it 5
    assert found["loaded, wrapped"] == ([2, 2, 2], 3)
    assert found["next step, wrapped"] == [3, 3, 3]


def test_megatrons_writer_takes_our_queue_and_starts_no_process(monkeypatch: pytest.MonkeyPatch):
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    checkpoint_writer.without_helper_process()
    assert isinstance(filesystem_async.get_write_results_queue(), queue.Queue)
    assert multiprocessing.active_children() == []
