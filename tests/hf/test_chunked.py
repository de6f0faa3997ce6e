"""The loss from hidden states and the output layer's weight, held to float64 with whole logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bft_megatron.hf.chunked import chunked_loss
from bft_megatron.objective import linear_logprobs, records
from bft_megatron.objective.records import Objective
from tests.helpers import objective_reference as reference
from tests.helpers.objective_reference import Setting

OBJECTIVES = [
    (records.balanced(group_size=4), Setting("bft", "samples")),
    (records.dft, Setting("dft", "tokens")),
    (records.sft, Setting("sft", "tokens")),
]
B, S, H, V = 3, 20, 8, 4099  # a vocabulary that is not a multiple of a tile


def _case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, S, H, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(V, (B, S), generator=generator)
    labels[:, :5] = reference.NONE
    labels[1] = reference.NONE
    labels[2, :12] = reference.NONE
    return hidden, weight, labels


def _expected(hidden: Tensor, weight: Tensor, labels: Tensor, setting: Setting, upstream: float):
    """Float64, rows one after the other -> loss, gradients of hidden and weight times `upstream`."""
    x, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=reference.NONE)
    logp = reference.logprobs(x @ w.T, shifted).flatten()
    edges = list(range(0, B * S + 1, S))
    total = reference.loss(setting, logp, shifted.flatten().tolist(), edges, torch.ones(B))
    supervised = shifted != reference.NONE
    loss = total / (supervised.any(1).sum() if setting.reduce == "samples" else supervised.sum())
    return loss.item(), *torch.autograd.grad(loss, (x, w), torch.tensor(upstream, dtype=torch.float64))


def _close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("objective", "setting"), OBJECTIVES, ids=lambda x: getattr(x, "name", ""))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str)
def test_float64(objective: Objective, setting: Setting, dtype: torch.dtype, tolerance: float, monkeypatch):
    monkeypatch.setattr(linear_logprobs, "TILE_BYTES", 1 << 16)  # several tiles
    hidden, weight, labels = _case(dtype)
    upstream = float(torch.rand((), generator=torch.Generator().manual_seed(3))) + 0.5
    loss = chunked_loss(hidden, weight, labels, objective=objective)
    found = torch.autograd.grad(loss, (hidden, weight), torch.tensor(upstream))
    expected, *gradients = _expected(hidden, weight, labels, setting, upstream)
    assert loss.item() == pytest.approx(expected, rel=tolerance)
    for mine, gradient in zip(found, gradients, strict=True):
        assert mine.dtype == dtype
        _close(mine, gradient, tolerance)


def test_the_divisor_can_be_given():
    hidden, weight, labels = _case()
    mean, whole = chunked_loss(hidden, weight, labels), chunked_loss(hidden, weight, labels, num_items=8)
    assert whole.item() == pytest.approx(mean.item() * 2 / 8)  # one of the three rows has no label


def test_packed_rows_are_samples():
    hidden, weight, labels = _case()
    packed = hidden.reshape(1, B * S, H), weight, labels.reshape(1, B * S)
    positions = torch.arange(S).repeat(B)[None]
    assert chunked_loss(*packed, position_ids=positions).item() == chunked_loss(hidden, weight, labels).item()
    assert chunked_loss(*packed).item() != pytest.approx(chunked_loss(hidden, weight, labels).item(), rel=1e-3)


def test_no_labels_give_zero_with_a_gradient():
    hidden, weight, labels = _case()
    loss = chunked_loss(hidden, weight, torch.full_like(labels, reference.NONE))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()
