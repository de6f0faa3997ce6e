"""The kernel against float64: one process and real tensor-parallel ones, any dtype, mask and vocabulary padding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bft_megatron.objective import sums
from bft_megatron.objective.logprobs import vocab_parallel_logprobs, vocab_parallel_statistics
from tests.helpers import objective_reference as reference
from tests.helpers.collectives import Collectives
from tests.helpers.world import run_world

CASES = {  # s, b, v, vocabulary, share masked, scale of the logits
    "plain": (7, 3, 48, 48, 0.5, 3.0),
    "padded vocabulary": (9, 2, 64, 37, 0.3, 3.0),
    "a shard of padding alone": (6, 2, 64, 15, 0.3, 3.0),
    "all masked": (4, 2, 64, 64, 1.0, 3.0),
    "nothing masked, one column a shard": (5, 1, 4, 4, 0.0, 1.0),
    "large logits": (16, 2, 64, 60, 0.2, 40.0),
    "several blocks, some without a label": (40, 1, 32000, 31990, 0.6, 3.0),
}

UPSTREAM = 3.0  # the largest upstream gradient
BLOCK = 1 << 20  # bytes: 8 rows of the vocabulary of 32,000


@pytest.fixture(autouse=True, scope="module")
def _small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "CPU_BLOCK_BYTES", BLOCK)
        yield


def _inputs(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, int]:
    """Logits [s, b, v], targets, an upstream gradient, the vocabulary. The masked rows come in runs."""
    s, b, v, vocabulary, masked, scale = CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    logits = (torch.randn(s, b, v, generator=generator) * scale).clamp(-80, 80).to(dtype)
    logits[..., vocabulary:] = 90.0  # padding must not matter, however large
    targets = torch.randint(vocabulary, (s, b), generator=generator)
    targets[: s // 4][torch.rand(s // 4, b, generator=generator) < 0.5] = logits[: s // 4, :, :vocabulary].argmax(-1)[
        0, 0
    ]
    targets[: round(s * masked)] = reference.NONE
    targets[-1, 0] = reference.NONE
    return logits, targets, torch.randn(s, b, generator=generator).clamp(-UPSTREAM, UPSTREAM), vocabulary


def _expected(logits: Tensor, targets: Tensor, upstream: Tensor, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """log p, gradient [s, b, v] and correct in float64."""
    x = logits.double().requires_grad_()
    logp = reference.logprobs(x, targets, vocabulary)
    (gradient,) = torch.autograd.grad((logp * upstream).sum(), x)
    largest = logits[..., :vocabulary].amax(-1)
    own = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return logp.detach(), gradient, (own == largest) & (targets != reference.NONE)


def _run(logits: Tensor, targets: Tensor, upstream: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = logits.clone().requires_grad_()
    statistics = vocab_parallel_statistics(x, targets, **options)
    (gradient,) = torch.autograd.grad((statistics.logp * upstream).sum(), x)
    return statistics.logp.detach(), gradient, statistics.correct


def _check(found: tuple[Tensor, Tensor, Tensor], expected: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> None:
    """log p to fp32's digits whatever the dtype, the gradient to those of the logits' dtype, which it has.

    fp32: 2e-7 of the upstream gradient, and 1e-5 of every single entry, even the tiniest, whose exponent is rounded.
    """
    torch.testing.assert_close(found[0].double(), expected[0], rtol=5e-7, atol=1e-7)
    assert found[0].dtype == torch.float32
    assert found[1].dtype == dtype
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    atol = 1e-7 if dtype == torch.float16 else 1e-15  # fp16's smallest number; float64's own rounding of 1 - p
    torch.testing.assert_close(found[1].double(), expected[1], rtol=rtol, atol=atol)
    if dtype == torch.float32:
        assert (found[1] - expected[1]).abs().max() <= 2e-7 * UPSTREAM
    assert torch.equal(found[2], expected[2])


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_one_process(case: str, dtype: torch.dtype, overwrite: bool):
    logits, targets, upstream, vocabulary = _inputs(case, dtype)
    found = _run(logits, targets, upstream, vocab_size=vocabulary, overwrite=overwrite)
    _check(found, _expected(logits, targets, upstream, vocabulary), dtype)


def _shards(overwrite: bool) -> dict[Any, tuple[Tensor, Tensor, Tensor]]:
    """On a rank: all cases with this rank's columns."""
    rank, tp = dist.get_rank(), dist.get_world_size()
    results = {}
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            logits, targets, upstream, vocabulary = _inputs(case, dtype)
            options = {"group": dist.group.WORLD, "vocab_size": vocabulary, "overwrite": overwrite}
            results[case, dtype] = _run(logits.chunk(tp, -1)[rank], targets, upstream, **options)
    return results


@pytest.mark.parametrize(("tp", "overwrite"), [(1, True), (2, False), (2, True), (4, False), (4, True)])
def test_tensor_parallel(tp: int, overwrite: bool):
    ranks = run_world(tp, _shards, overwrite)
    for (case, dtype), (logp, _, correct) in ranks[0].items():
        for other in ranks[1:]:
            assert torch.equal(logp.view(torch.int32), other[case, dtype][0].view(torch.int32)), (
                "bits differ over ranks"
            )
            assert torch.equal(correct, other[case, dtype][2])
        gradient = torch.cat([rank[case, dtype][1] for rank in ranks], -1)
        logits, targets, upstream, vocabulary = _inputs(case, dtype)
        _check((logp, gradient, correct), _expected(logits, targets, upstream, vocabulary), dtype)


def _count_collectives() -> tuple[list, list]:
    logits, targets, _, vocabulary = _inputs("plain", torch.float32)
    x = logits.chunk(2, -1)[dist.get_rank()].clone().requires_grad_()
    with Collectives() as forward:
        logp = vocab_parallel_logprobs(x, targets, group=dist.group.WORLD, vocab_size=vocabulary)
    with Collectives() as backward:
        logp.sum().backward()
    return forward.seen, backward.seen


def test_two_collectives_forward_and_none_backward():
    n = 7 * 3
    for forward, backward in run_world(2, _count_collectives):
        assert forward == [("allreduce", 4 * n), ("allreduce", 2 * 8 * n)]
        assert backward == []


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_shape_and_mask(data: st.DataObject):
    s, b, v = (data.draw(st.integers(1, high), name) for name, high in (("s", 6), ("b", 3), ("v", 40)))
    vocabulary = data.draw(st.integers(1, v), "vocabulary")
    label = st.one_of(st.just(reference.NONE), st.integers(0, vocabulary - 1))
    targets = torch.tensor(data.draw(st.lists(label, min_size=s * b, max_size=s * b), "targets")).view(s, b)
    torch.manual_seed(data.draw(st.integers(0, 999), "seed"))
    logits = (torch.randn(s, b, v) * data.draw(st.sampled_from([0.1, 3.0, 30.0]), "scale")).clamp(-80, 80)
    upstream = torch.randn(s, b).clamp(-UPSTREAM, UPSTREAM)
    expected = _expected(logits, targets, upstream, vocabulary)
    for overwrite in (False, True):
        found = _run(logits, targets, upstream, vocab_size=vocabulary, overwrite=overwrite)
        _check(found, expected, torch.float32)


def test_nearly_certain_tokens_keep_their_digits():
    """p = 1 - 4e-6: both log p and the gradient of the label are relative to 1 - p, not to 1."""
    logits = torch.zeros(3, 1, 30)
    logits[..., 5] = 15.8
    targets, upstream = torch.full((3, 1), 5), torch.tensor([[1.0], [-0.3], [7.0]])
    expected = _expected(logits, targets, upstream, 30)
    for overwrite in (False, True):
        found = _run(logits, targets, upstream, overwrite=overwrite)
        for mine, theirs in zip(found[:2], expected[:2], strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=0)
    assert -1e-5 < expected[0].max() < 0


def test_a_tie_counts_as_correct():
    logits = torch.tensor([[[1.0, 3.0, 3.0, 0.0]]]).expand(3, 1, 4)
    correct = vocab_parallel_statistics(logits, torch.tensor([[1], [2], [0]])).correct
    assert correct[:, 0].tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_callers_logits_are_only_read(dtype: torch.dtype):
    logits, targets, upstream, vocabulary = _inputs("padded vocabulary", dtype)
    x = logits.clone().requires_grad_()
    logp = vocab_parallel_logprobs(x, targets, vocab_size=vocabulary)
    (first,) = torch.autograd.grad((logp * upstream).sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad((logp * upstream).sum(), x)
    assert torch.equal(x, logits)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(logp.sum(), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overwriting_takes_the_logits_storage(dtype: torch.dtype):
    logits, targets, upstream, vocabulary = _inputs("padded vocabulary", dtype)
    x = logits.clone().requires_grad_()
    logp = vocab_parallel_logprobs(x, targets, vocab_size=vocabulary, overwrite=True)
    assert torch.equal(x, logits) == (dtype == torch.bfloat16)
    (gradient,) = torch.autograd.grad((logp * upstream).sum(), x, retain_graph=True)
    assert gradient.data_ptr() == x.data_ptr()
    with pytest.raises(RuntimeError, match="second backward"):
        torch.autograd.grad(logp.sum(), x)


class _Allocations(TorchDispatchMode):
    """Records the size of every storage that was not there before."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known, self.largest = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple) else (result,):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overwriting_allocates_no_more_than_a_block(dtype: torch.dtype):
    logits, targets, upstream, _ = _inputs("several blocks, some without a label", dtype)
    assert logits.nbytes > 2 * BLOCK
    x = logits.requires_grad_()
    with _Allocations(x) as allocations:
        logp = vocab_parallel_logprobs(x, targets, overwrite=True)
        torch.autograd.grad((logp * upstream).sum(), x)
    assert 0 < allocations.largest <= BLOCK


def test_overwriting_refuses_logits_that_it_would_have_to_copy():
    x = torch.randn(4, 3, 8).transpose(0, 1).requires_grad_()
    with pytest.raises(RuntimeError, match="view"):
        vocab_parallel_logprobs(x, torch.zeros(3, 4, dtype=torch.int64), overwrite=True)


def test_logits_of_any_layout_are_read_in_place():
    logits, targets, upstream, vocabulary = _inputs("plain", torch.float32)
    strided = logits.transpose(0, 1).contiguous().transpose(0, 1)
    for mine, theirs in zip(
        _run(strided, targets, upstream, vocab_size=vocabulary),
        _run(logits, targets, upstream, vocab_size=vocabulary),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


def test_without_gradient_nothing_is_overwritten():
    logits, targets, upstream, vocabulary = _inputs("padded vocabulary", torch.float32)
    x = logits.clone().requires_grad_()
    with torch.no_grad():
        logp = vocab_parallel_logprobs(x, targets, vocab_size=vocabulary, overwrite=True)
    assert not logp.requires_grad
    assert torch.equal(x, logits)
    torch.testing.assert_close(logp.double(), _expected(logits, targets, upstream, vocabulary)[0], rtol=5e-7, atol=1e-7)


@pytest.mark.parametrize("overwrite", [False, True])
def test_blocks_without_a_label_are_not_computed(overwrite: bool):
    logits, targets, upstream, _ = _inputs("several blocks, some without a label", torch.float32)
    unlabelled = (targets == reference.NONE).all(1).nonzero()[:8, 0]  # a block is 8 rows of this vocabulary
    logits[unlabelled] = float("nan")
    logp, gradient, _ = _run(logits, targets, upstream, overwrite=overwrite)
    assert logp.isfinite().all()
    assert gradient.isfinite().all()
    assert (gradient[unlabelled] == 0).all()
    assert gradient.any()
