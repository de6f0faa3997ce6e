"""The head without logits against float64: real tensor-parallel processes, uneven masks, tiles that do not divide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bft_megatron.objective import linear_logprobs
from bft_megatron.objective.linear_logprobs import vocab_parallel_linear_logprobs, vocab_parallel_linear_statistics
from bft_megatron.objective.logprobs import vocab_parallel_statistics
from tests.helpers import objective_reference as reference
from tests.helpers.collectives import Collectives
from tests.helpers.world import run_world

CASES = {  # s, b, v, vocabulary, supervised rows of s
    "uneven mask": (16, 3, 64, 61, range(5, 13)),
    "nothing masked": (8, 2, 64, 64, range(8)),
    "all masked": (8, 2, 64, 64, range(0)),
    "one row": (8, 1, 64, 64, range(6, 7)),
    "a shard of padding alone": (8, 2, 64, 15, range(3, 8)),
}
H = 12
TILE = 4 * 4 * 7  # bytes: seven columns of four fp32 rows, which divide neither rows nor vocabulary
CHUNK = 4


def _inputs(case: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """hidden [s, b, h], weight [v, h], targets, upstream gradient, vocabulary."""
    s, b, v, vocabulary, supervised = CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    hidden, weight = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((s, b, H), (v, H)))
    targets = torch.randint(vocabulary, (s, b), generator=generator)
    targets[[i for i in range(s) if i not in supervised]] = reference.NONE
    if len(supervised) > 3:
        targets[supervised[1], 0] = reference.NONE
        targets[supervised[0], 0] = (hidden[supervised[0], 0] @ weight[:vocabulary].T).argmax()
    return hidden, weight, targets, torch.randn(s, b, generator=generator), vocabulary


def _expected(case: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    hidden, weight, targets, upstream, vocabulary = _inputs(case, dtype)
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = h @ w.T
    logp = reference.logprobs(logits, targets, vocabulary)
    d_hidden, d_weight = torch.autograd.grad((logp * upstream).sum(), (h, w))
    p = logits.detach()[..., :vocabulary].softmax(-1)
    supervised = targets != reference.NONE
    return {
        "logp": logp.detach(),
        "correct": (p.argmax(-1) == targets) & supervised,
        "entropy": torch.special.entr(p).sum(-1) * supervised,
        "d_hidden": d_hidden,
        "d_weight": d_weight,
    }


def _run(case: str, dtype: torch.dtype = torch.float32, tile: int = TILE, **options: Any) -> dict[str, Tensor]:
    """On a rank of a world, or with no group on one process: this rank's share of everything."""
    linear_logprobs.TILE_BYTES = tile
    hidden, weight, targets, upstream, vocabulary = _inputs(case, dtype)
    group = options.get("group")
    if group is not None:
        weight = weight.chunk(dist.get_world_size(group))[dist.get_rank(group)]
        if options.get("sequence_parallel"):
            hidden = hidden.chunk(dist.get_world_size(group))[dist.get_rank(group)]
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    found = vocab_parallel_linear_statistics(
        h, w, targets, chunk_size=CHUNK, vocab_size=vocabulary, entropy=True, **options
    )
    d_hidden, d_weight = torch.autograd.grad((found.logp * upstream).sum(), (h, w))
    return {
        "logp": found.logp.detach(),
        "correct": found.correct,
        "entropy": found.entropy,
        "d_hidden": d_hidden,
        "d_weight": d_weight,
    }


def _check(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 3e-6) -> None:
    assert found["logp"].dtype == found["entropy"].dtype == torch.float32
    assert torch.equal(found["correct"], expected["correct"])
    for name in ("logp", "entropy", "d_hidden", "d_weight"):
        torch.testing.assert_close(found[name].double(), expected[name], rtol=atol, atol=atol, msg=name)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores the size of a tile that `_run` sets."""
    monkeypatch.setattr(linear_logprobs, "TILE_BYTES", TILE)


@pytest.mark.parametrize("tile", [1, TILE, 1 << 20])
@pytest.mark.parametrize("case", CASES)
def test_one_process(case: str, tile: int):
    _check(_run(case, tile=tile), _expected(case))


def test_bf16_adds_up_in_fp32():
    """The same digits as over bf16 logits of the same product: tiles of rows and columns lose none."""
    case, dtype = "uneven mask", torch.bfloat16
    expected, found = _expected(case, dtype), _run(case, dtype)
    hidden, weight, targets, upstream, vocabulary = _inputs(case, dtype)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    logp = vocab_parallel_statistics(h @ w.T, targets, vocab_size=vocabulary).logp
    whole = torch.autograd.grad((logp * upstream).sum(), (h, w))
    torch.testing.assert_close(found["logp"], logp.detach(), rtol=1e-6, atol=1e-6)
    for name, other in zip(("d_hidden", "d_weight"), whole, strict=True):
        assert found[name].dtype == dtype
        ours, theirs = ((x.double() - expected[name]).norm() for x in (found[name], other))
        assert 0 < ours <= 1.25 * theirs, name


def _shards(sequence_parallel: bool) -> dict[str, dict[str, Tensor]]:
    group = dist.group.WORLD
    return {case: _run(case, group=group, sequence_parallel=sequence_parallel) for case in CASES}


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, True), (2, False), (2, True), (4, False), (4, True)])
def test_tensor_parallel(tp: int, sequence_parallel: bool):
    ranks = run_world(tp, _shards, sequence_parallel)
    for case in CASES:
        of_ranks = [rank[case] for rank in ranks]
        found = dict(of_ranks[0])
        for other in of_ranks[1:]:
            for name in ("logp", "entropy"):  # weights are made of them: the same bits, or ranks drift apart
                assert torch.equal(found[name].view(torch.int32), other[name].view(torch.int32)), name
            assert torch.equal(found["correct"], other["correct"])
        found["d_weight"] = torch.cat([rank["d_weight"] for rank in of_ranks])
        if sequence_parallel:
            found["d_hidden"] = torch.cat([rank["d_hidden"] for rank in of_ranks])
        _check(found, _expected(case))


def _count(sequence_parallel: bool, case: str) -> tuple[list, list]:
    linear_logprobs.TILE_BYTES = TILE
    hidden, weight, targets, _, vocabulary = _inputs(case)
    rank = dist.get_rank()
    h = (hidden.chunk(2)[rank] if sequence_parallel else hidden).clone().requires_grad_()
    w = weight.chunk(2)[rank].clone().requires_grad_()
    options = {"group": dist.group.WORLD, "sequence_parallel": sequence_parallel, "vocab_size": vocabulary}
    with Collectives() as forward:
        logp = vocab_parallel_linear_logprobs(h, w, targets, chunk_size=CHUNK, **options)
    with Collectives() as backward:
        logp.sum().backward()
    return forward.seen, backward.seen


def test_collectives_do_not_grow_with_the_tiles_and_carry_only_rows_that_count():
    n, held = 8 * 3 - 1, (3 * 3 - 1, 5 * 3)  # rows 5 to 12 of 16, but one; of the two halves
    statistics = [("allreduce", 4 * n), ("allreduce", 2 * 8 * n)]
    for forward, backward in run_world(2, _count, False, "uneven mask"):
        assert forward == statistics
        assert backward == [("allreduce", 4 * n * H)]
    part = 4 * max(held) * H
    for forward, backward in run_world(2, _count, True, "uneven mask"):
        assert forward == [("allgather_base", part), *statistics]
        assert backward == [("allgather_base", part), ("reduce_scatter_base", 2 * part)]
    for forward, backward in run_world(2, _count, True, "all masked"):
        assert forward == backward == []


@pytest.mark.parametrize("case", ["uneven mask", "all masked"])
@pytest.mark.parametrize("tied", [False, True])
def test_main_grad_is_added_to_as_megatron_asks(tied: bool, case: str):
    hidden, weight, targets, upstream, vocabulary = _inputs(case)
    w = torch.nn.Parameter(weight)
    w.main_grad, w.grad_added_to_main_grad, w.zero_out_wgrad = torch.ones_like(weight), False, tied
    logp = vocab_parallel_linear_statistics(
        hidden, w, targets, chunk_size=CHUNK, vocab_size=vocabulary, fuse_main_grad=True
    ).logp
    (logp * upstream).sum().backward()
    assert w.grad_added_to_main_grad
    assert w.grad.shape == w.shape
    if tied:
        assert not w.grad.any()
    torch.testing.assert_close(w.main_grad.double() - 1, _expected(case)["d_weight"], rtol=3e-6, atol=3e-6)


def test_a_frozen_weight_gets_no_gradient_and_the_hidden_states_do():
    hidden, weight, targets, upstream, vocabulary = _inputs("uneven mask")
    h = hidden.requires_grad_()
    logp = vocab_parallel_linear_logprobs(h, weight, targets, chunk_size=CHUNK, vocab_size=vocabulary)
    (logp * upstream).sum().backward()
    torch.testing.assert_close(h.grad.double(), _expected("uneven mask")["d_hidden"], rtol=3e-6, atol=3e-6)


def test_rows_without_a_label_are_not_read():
    hidden, weight, targets, _, vocabulary = _inputs("uneven mask")
    hidden[targets == reference.NONE] = torch.nan
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    vocab_parallel_linear_logprobs(h, w, targets, vocab_size=vocabulary).sum().backward()
    assert h.grad.isfinite().all()
    assert w.grad.isfinite().all()
    assert w.grad.any()


@pytest.mark.parametrize("overwrite", [False, True])
def test_entropy_over_logits(overwrite: bool):
    hidden, weight, targets, _, vocabulary = _inputs("uneven mask")
    logits = (hidden @ weight.T).requires_grad_()
    found = vocab_parallel_statistics(logits, targets, vocab_size=vocabulary, entropy=True, overwrite=overwrite)
    assert not found.entropy.requires_grad
    torch.testing.assert_close(found.entropy.double(), _expected("uneven mask")["entropy"], rtol=3e-6, atol=3e-6)


def test_shapes_and_dtypes_that_do_not_go_together_are_refused():
    hidden, weight, targets, _, _ = _inputs("uneven mask")
    with pytest.raises(ValueError, match=r"bfloat16.*float32"):
        vocab_parallel_linear_logprobs(hidden.bfloat16(), weight, targets)
    with pytest.raises(ValueError, match="targets"):
        vocab_parallel_linear_logprobs(hidden[1:], weight, targets)
