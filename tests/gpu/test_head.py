"""The head on a GPU against float64: over logits and chunked, torch and Triton, fp32 and bf16.

Half of the rows have no label, the vocabulary is padded, some labels are nearly certain, the upstream gradient random.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bft_megatron.labels import IGNORE_INDEX
from bft_megatron.objective.linear_logprobs import vocab_parallel_linear_statistics
from bft_megatron.objective.logprobs import vocab_parallel_statistics
from bft_megatron.objective.sums import TORCH, Kernels, Statistics
from bft_megatron.objective.triton_tiles import TRITON

N, H, V, PADDED = 384, 256, 32_001, 32_128
KERNELS = {"torch": TORCH, "triton": TRITON}


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [n, 1, h], weight [v, h], targets [n, 1] on the CPU, upstream gradient [n, 1]."""
    g = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(N, 1, H, generator=g), torch.randn(PADDED, H, generator=g) / H**0.5
    targets = torch.randint(V, (N, 1), generator=g)
    hidden[::3, 0] += 8 * weight[targets[::3, 0]]
    targets[torch.rand(N, 1, generator=g) < 0.5] = IGNORE_INDEX
    return hidden.to("cuda", dtype), weight.to("cuda", dtype), targets, torch.randn(N, 1, generator=g).cuda()


def exact(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p, entropy and argmax of float64 logits [n, 1, v], written out; 0 where there is no label."""
    supervised, logp = targets != IGNORE_INDEX, logits[..., :V].log_softmax(-1)
    at = logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return at.where(supervised, 0.0), entropy.where(supervised, 0.0), (logp.argmax(-1) == targets) & supervised


def distance(x: Tensor, to: Tensor) -> float:
    return float((x.double() - to).norm() / to.norm())


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("overwrite", [True, False], ids=["overwrite", "read"])
def test_over_logits(kernels: str, dtype: torch.dtype, overwrite: bool):
    hidden, weight, targets, upstream = inputs(dtype)
    logits, targets = hidden @ weight.t(), targets.cuda()
    d = logits.double().requires_grad_()
    logp, entropy, correct = exact(d, targets)
    (gradient,) = torch.autograd.grad((logp * upstream).sum(), d)
    own = logits.clone().requires_grad_()
    leaf = own * 1  # the head may only overwrite what is no leaf
    leaf.retain_grad()
    found = vocab_parallel_statistics(
        leaf, targets, vocab_size=V, overwrite=overwrite, entropy=True, kernels=KERNELS[kernels]
    )
    (found.logp * upstream).sum().backward()
    assert distance(found.logp, logp.detach()) < 1e-6
    assert distance(found.entropy, entropy.detach()) < 1e-6
    assert torch.equal(found.correct, correct)
    assert distance(own.grad, gradient) < (2e-6 if dtype == torch.float32 else 3e-3)
    assert not own.grad[..., V:].any()
    assert not own.grad[targets == IGNORE_INDEX].any()


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("chunk", [100, 8192])
def test_chunked(kernels: str, dtype: torch.dtype, chunk: int):
    hidden, weight, targets, upstream = inputs(dtype)
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logp, entropy, correct = exact(h @ w.t(), targets.cuda())
    gradients = torch.autograd.grad((logp * upstream).sum(), (h, w))
    hidden.requires_grad_(), weight.requires_grad_()
    found = vocab_parallel_linear_statistics(
        hidden, weight, targets, chunk_size=chunk, vocab_size=V, entropy=True, kernels=KERNELS[kernels]
    )
    own = torch.autograd.grad((found.logp * upstream).sum(), (hidden, weight))
    assert distance(found.logp, logp.detach()) < 2e-6  # fp32 tiles of bf16 products: exact but for their order
    assert distance(found.entropy, entropy.detach()) < 2e-6
    assert torch.equal(found.correct, correct)
    for x, expected in zip(own, gradients, strict=True):
        assert distance(x, expected) < (5e-6 if dtype == torch.float32 else 5e-3)


def _over_logits(kernels: Kernels, targets: Tensor) -> Callable[[Tensor, Tensor], Statistics]:
    on_device = targets.cuda()
    return lambda h, w: vocab_parallel_statistics(
        h @ w.t(), on_device, vocab_size=V, overwrite=True, entropy=True, kernels=kernels
    )


def _chunked(kernels: Kernels, targets: Tensor) -> Callable[[Tensor, Tensor], Statistics]:
    return lambda h, w: vocab_parallel_linear_statistics(
        h, w, targets.pin_memory(), vocab_size=V, entropy=True, kernels=kernels
    )


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("head", [_over_logits, _chunked], ids=["logits", "chunked"])
def test_the_host_never_waits(head: Callable[..., Callable[[Tensor, Tensor], Statistics]], kernels: str, request):
    hidden, weight, targets, upstream = inputs(torch.bfloat16)
    hidden.requires_grad_(), weight.requires_grad_()
    run = head(KERNELS[kernels], targets)

    def step() -> None:
        torch.autograd.grad((run(hidden, weight).logp * upstream).sum(), (hidden, weight))

    step()  # compiles
    request.getfixturevalue("no_waiting")
    step()
