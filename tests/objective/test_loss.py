"""Loss, count and gradient of the logits against float64 autograd, in one process and over real TP and CP ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bft_megatron.errors import FieldError
from bft_megatron.objective import records
from bft_megatron.objective.logprobs import vocab_parallel_logprobs
from bft_megatron.objective.lookup import lookup
from bft_megatron.objective.loss import objective_sum
from bft_megatron.objective.records import Objective
from bft_megatron.objective.view import Geometry, View
from tests.helpers import objective_reference as reference
from tests.helpers.objective_reference import Setting
from tests.helpers.world import run_world

LENGTHS, VOCABULARY = [40, 16, 24, 64, 8, 32], 26  # packed; the third sample has no label, the last is the tail
GRID = [
    Setting("sft", "tokens"),
    Setting("sft", "samples"),
    Setting("dft", "tokens"),
    Setting("dft", "samples"),
    Setting("bft", "samples"),
    Setting("bft", "tokens", gamma=0.5),
    Setting("bft", "samples", group_size=7, gamma=2.0),
    Setting("bft", "samples", confidence="arithmetic"),
    Setting("bft", "tokens", group_size=1000, confidence="arithmetic"),
    Setting("power", "tokens", options={"alpha": 0.5}),
    Setting("threshold", "samples", options={"q": 0.2}),
    Setting("focal", "tokens", options={"gamma": 2}),
]


def _objective(setting: Setting) -> Objective:
    return lookup(
        setting.name,
        group_size=setting.group_size,
        gamma=setting.gamma,
        confidence=setting.confidence,
        reduce=setting.reduce,
        options=setting.options,
    )


def _data() -> tuple[Tensor, Tensor, list[int], Tensor, Tensor]:
    """logits [N, v], labels [N], edges, counted [B], weight [B] of a packed row."""
    generator = torch.Generator().manual_seed(11)
    labels = reference.random_rows(generator, LENGTHS, VOCABULARY)
    labels[-LENGTHS[-1] :] = reference.NONE
    edges = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    weight = torch.tensor([1.0, 0.5, 1.0, 2.0, 1.0, 0.0])
    logits = torch.randn(sum(LENGTHS), VOCABULARY, generator=generator)
    bonus = 7 * torch.rand(sum(LENGTHS), 1, generator=generator)  # likely labels: else every confidence is nearly 0
    logits.scatter_add_(1, labels.clamp(min=0)[:, None], bonus)
    return logits, labels, edges, torch.arange(len(LENGTHS)) < len(LENGTHS) - 1, weight


def _expected(setting: Setting, cp: int) -> tuple[float, Tensor]:
    logits, labels, edges, _, weight = _data()
    x = logits.double().requires_grad_()
    loss = reference.loss(setting, reference.logprobs(x, labels), labels, edges, weight, cp)
    (gradient,) = torch.autograd.grad(loss, x)
    return loss.item(), gradient


def _rank(setting: Setting, tp: int, cp: int, windows: Any) -> tuple[float, int, list[int], Tensor]:
    """On a rank of a tp x cp world: its loss, its count, its positions, its gradient [N/cp, v/tp]."""
    groups: list[Any] = [None, None]
    if tp * cp > 1:
        mesh = dist.init_device_mesh("cpu", (cp, tp))
        groups = [mesh.get_group(0) if cp > 1 else None, mesh.get_group(1) if tp > 1 else None]
    logits, labels, edges, counted, weight = _data()
    geometry = Geometry(labels, torch.tensor(edges), counted, weight, groups[0], windows)
    shard = logits.chunk(tp, -1)[dist.get_rank(groups[1]) if tp > 1 else 0]
    x = shard[geometry.positions].clone().requires_grad_()
    logp = vocab_parallel_logprobs(x[:, None], labels[geometry.positions][:, None], group=groups[1]).flatten()
    result = objective_sum(_objective(setting), geometry, geometry.view(logp), logp)
    (gradient,) = torch.autograd.grad(result.loss, x)
    return float(result.loss.detach()), result.count, geometry.positions.tolist(), gradient


def _ranks(tp: int, cp: int, windows: str) -> list[tuple[float, int, list[int], Tensor]]:
    return [_rank(setting, tp, cp, windows) for setting in GRID]


def _check(ranks: list[tuple[float, int, list[int], Tensor]], setting: Setting, tp: int, cp: int) -> None:
    """Ranks in the order of (cp, tp); `cp` 1 in the reference stands for windows over whole samples."""
    loss, gradient = _expected(setting, cp)
    ranks_of_one_shard = ranks[::tp]
    assert sum(r[0] for r in ranks_of_one_shard) == pytest.approx(loss, rel=1e-6)
    labels = _data()[1]
    count = len(LENGTHS) - 1 if setting.reduce == "samples" else int((labels != reference.NONE).sum())
    for shard in range(tp):
        assert sum(r[1] for r in ranks[shard::tp]) == count
    found = torch.zeros_like(gradient)
    for i, (_, _, positions, part) in enumerate(ranks):
        width = part.shape[1]
        found[positions, (i % tp) * width : (i % tp + 1) * width] = part.double()
    assert (found - gradient).abs().max() <= 1e-6 * gradient.abs().max()


@pytest.mark.parametrize("setting", GRID, ids=str)
def test_one_process(setting: Setting):
    _check([_rank(setting, 1, 1, "per_rank")], setting, 1, 1)


@pytest.mark.parametrize(
    ("tp", "cp", "windows"),
    [(2, 1, "per_rank"), (1, 2, "per_rank"), (1, 2, "exact"), (1, 4, "exact"), (2, 2, "per_rank")],
)
def test_layouts_equal_one_process(tp: int, cp: int, windows: str):
    ranks = run_world(tp * cp, _ranks, tp, cp, windows)
    for i, setting in enumerate(GRID):
        _check([rank[i] for rank in ranks], setting, tp, cp if windows == "per_rank" else 1)


def test_the_reference_tells_chunked_windows_from_whole_ones():
    """Else the layout test could not tell per_rank from exact."""
    for setting in GRID[4:8]:
        assert _expected(setting, 2)[0] != pytest.approx(_expected(setting, 1)[0], rel=1e-5)


def test_packed_padded_and_one_by_one_are_equal():
    logits, labels, edges, _, weight = _data()
    objective = _objective(GRID[4])
    longest = max(LENGTHS)
    total, padded_logp, padded_labels = 0.0, [], []
    for b, length in enumerate(LENGTHS):
        part = slice(edges[b], edges[b + 1])
        logp = vocab_parallel_logprobs(logits[part], labels[part])
        alone = Geometry(labels[part], torch.tensor([0, length]), torch.tensor([True]), weight[b : b + 1])
        total += float(objective_sum(objective, alone, alone.view(logp), logp).loss)
        padded_logp.append(torch.nn.functional.pad(logp, (0, longest - length)))
        padded_labels.append(torch.nn.functional.pad(labels[part], (0, longest - length), value=reference.NONE))
    logp = torch.cat(padded_logp)
    batch = Geometry(torch.cat(padded_labels), torch.arange(len(LENGTHS) + 1) * longest, torch.ones(6) > 0, weight)
    assert float(objective_sum(objective, batch, batch.view(logp), logp).loss) == pytest.approx(total, rel=1e-6)
    assert _rank(GRID[4], 1, 1, "per_rank")[0] == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("name", ["sft", "dft", "bft"])
def test_without_a_supervised_token_the_loss_keeps_its_graph(name: str):
    geometry = Geometry(
        torch.full((6,), reference.NONE), torch.tensor([0, 4, 6]), torch.tensor([True, False]), torch.ones(2)
    )
    logp = torch.randn(6).requires_grad_()
    result = objective_sum(_objective(Setting(name, "samples")), geometry, geometry.view(logp), logp)
    result.loss.backward()
    assert result.loss.item() == 0
    assert logp.grad.tolist() == [0.0] * 6
    assert result.count == 1


def test_the_loss_is_a_scalar_of_its_own_and_ignores_masked_positions():
    labels = torch.tensor([3, reference.NONE, 4])
    geometry = Geometry(labels, torch.tensor([0, 3]), torch.tensor([True]), torch.ones(1))
    logp = torch.tensor([-1.0, float("nan"), -2.0]).requires_grad_()
    result = objective_sum(records.sft, geometry, geometry.view(logp), logp)
    result.loss.backward()
    assert (result.loss.item(), result.count, result.loss.dtype) == (3.0, 2, torch.float32)
    assert not result.loss._is_view()
    assert logp.grad.tolist() == [-1.0, 0.0, -1.0]


def test_the_datas_weight_scales_a_sample_and_not_the_count():
    labels, edges, counted = torch.tensor([1, 1, 1]), torch.tensor([0, 1, 3]), torch.tensor([True, True])
    logp = torch.tensor([-1.0, -2.0, -4.0])
    for reduce, loss, count in (("tokens", 0.5 + 18.0, 3), ("samples", 0.5 + 9.0, 2)):
        geometry = Geometry(labels, edges, counted, torch.tensor([0.5, 3.0]))
        result = objective_sum(_objective(Setting("sft", reduce)), geometry, geometry.view(logp), logp)
        assert (result.loss.item(), result.count) == (loss, count)
        assert result.sample_weight.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (lambda view: view.logp, "returns Tensor, not two tensors, of the tokens and of the samples"),
        (lambda view: (view.logp, 1.0), "returns tuple, not two tensors"),
        (lambda view: (view.logp[:, None], view.weight), r"tokens' weights have the shape \(3, 1\), not \(3,\)"),
        (lambda view: (view.logp, view.logp), r"samples' weights have the shape \(3,\), not \(1,\)"),
        (lambda view: (view.logp, view.n), r"samples' weights are of torch.int64, which is no floating-point type"),
        (lambda view: (view.logp.to("meta"), view.weight), "tokens' weights are on meta, the view is on cpu"),
    ],
)
def test_weights_that_cannot_be_used_are_refused_by_name_and_place(weights: Callable[[View], Any], message: str):
    geometry = Geometry(torch.tensor([1, 1, 1]), torch.tensor([0, 3]), torch.tensor([True]), torch.ones(1))
    wrong = Objective("wrong", "tokens", frozenset(), weights)
    with pytest.raises(FieldError, match=rf"objective.name: {__file__}:\d+: objective 'wrong': .*{message}"):
        objective_sum(wrong, geometry, geometry.view(torch.zeros(3)), torch.zeros(3))
