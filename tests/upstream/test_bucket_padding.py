"""Megatron saves other parameters' state behind a padded bucket; mended, and left alone where Megatron mends it."""

from __future__ import annotations

from typing import Any

import pytest

from bft_megatron.upstream import bucket_padding
from bft_megatron.upstream.bucket_padding import SHARDED_STATE
from tests.helpers.world import run_world
from tests.upstream.optimizers import SIZE, build, saved

OWN = [[float(i + 1)] * SIZE for i in range(3)]


def _saved_before_and_after() -> tuple[bool, list[list[float]], list[list[float]]]:
    ddp, optimizer = build()
    optimizer.state_dict()  # gives Adam its state
    paddings = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in ddp.buffers[0].buckets]
    before = [x.tolist() for x in saved(ddp, optimizer)]
    bucket_padding.mend()
    return min(paddings) > 0, before, [x.tolist() for x in saved(ddp, optimizer)]


@pytest.mark.parametrize("world", [1, 2])
def test_a_real_optimizer_saves_each_parameters_own_state_only_when_mended(world: int):
    for padded, before, after in run_world(world, _saved_before_and_after, megatron=True):
        assert padded
        assert before != OWN
        assert after == OWN


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Megatron's own, put back after the test."""
    original = SHARDED_STATE.owner.sharded_param_state_fully_reshardable
    monkeypatch.setattr(SHARDED_STATE.owner, SHARDED_STATE.name, original)
    return original


def test_the_trial_finds_the_bug_in_this_release_and_its_cure(method: Any):
    assert not bucket_padding.saves_each_its_own()
    bucket_padding.mend()
    assert bucket_padding.saves_each_its_own()


def test_a_mended_method_is_left_alone(method: Any, monkeypatch: pytest.MonkeyPatch):
    """As pull request #5077 has it: the padding that was stripped is taken out of the places."""

    def fixed(self: Any, *args: Any, **kwargs: Any) -> Any:
        (buffer,) = self.buffers
        padded = buffer.param_index_map
        strips = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
        buffer.param_index_map = {
            p: (start - sum(strips[:bucket]), end - sum(strips[:bucket]), bucket)
            for p, (start, end, bucket) in padded.items()
        }
        try:
            return method(self, *args, **kwargs)
        finally:
            buffer.param_index_map = padded

    monkeypatch.setattr(SHARDED_STATE.owner, SHARDED_STATE.name, fixed)
    assert bucket_padding.saves_each_its_own()
    bucket_padding.mend()
    assert SHARDED_STATE.owner.sharded_param_state_fully_reshardable is fixed


def test_a_method_that_the_trial_cannot_call_stops_the_run(method: Any, monkeypatch: pytest.MonkeyPatch):
    def another(self: Any, *_: Any, **__: Any) -> Any:
        return self.something_new

    monkeypatch.setattr(SHARDED_STATE.owner, SHARDED_STATE.name, another)
    with pytest.raises(RuntimeError, match="cannot tell whether this Megatron saves the right state"):
        bucket_padding.mend()
