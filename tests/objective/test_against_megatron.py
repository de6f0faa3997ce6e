"""Our heads against Megatron's cross entropy: no further from float64, and what the one without logits holds."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bft_megatron.objective import linear_logprobs
from bft_megatron.objective.linear_logprobs import vocab_parallel_linear_logprobs, vocab_parallel_linear_statistics
from bft_megatron.objective.logprobs import vocab_parallel_logprobs
from tests.helpers import objective_reference as reference
from tests.helpers.memory import Peak
from tests.helpers.world import run_world

N, H, V = 192, 64, 4096


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [n, 1, h], weight [v, h], targets, upstream gradient; every other label is likely."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(N, 1, H, generator=generator), torch.randn(V, H, generator=generator) / H**0.5
    targets = torch.randint(V, (N, 1), generator=generator)
    hidden[::2, 0] += 10 * weight[targets[::2, 0]]
    return hidden.to(dtype), weight.to(dtype), targets, torch.randn(N, 1, generator=generator)


def _errors(dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """On a rank: head -> tensor -> distance to float64, of this rank's part of the weight."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

    group, rank, tp = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    hidden, weight, targets, upstream = _inputs(dtype)

    def logits(h: Tensor, w: Tensor) -> Tensor:
        return copy_to_tensor_model_parallel_region(h, group) @ w.t()

    heads = {
        "megatron": lambda h, w: -vocab_parallel_cross_entropy(logits(h, w), targets, tp_group=group),
        "logits": lambda h, w: vocab_parallel_logprobs(logits(h, w), targets, group=group, overwrite=True),
        "chunked": lambda h, w: vocab_parallel_linear_logprobs(h, w, targets, group=group, chunk_size=80),
    }

    def numbers(logp: Tensor, h: Tensor, w: Tensor) -> dict[str, Tensor]:
        d_hidden, d_weight = torch.autograd.grad((logp * upstream).sum(), (h, w))
        return {"logp": logp.detach().double(), "d_hidden": d_hidden.double(), "d_weight": d_weight.double()}

    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    exact = numbers(reference.logprobs(h64 @ w64.t(), targets), h64, w64)
    exact["d_weight"] = exact["d_weight"].chunk(tp)[rank]
    found = {}
    for name, head in heads.items():
        h, w = hidden.clone().requires_grad_(), weight.chunk(tp)[rank].clone().requires_grad_()
        mine = numbers(head(h, w), h, w)
        found[name] = {key: float((mine[key] - exact[key]).norm()) for key in exact}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tp", [1, 2])
def test_errors_are_no_larger_than_megatrons(tp: int, dtype: torch.dtype):
    for rank in run_world(tp, _errors, dtype):
        for head in ("logits", "chunked"):
            for tensor, error in rank[head].items():
                assert 0 < error <= 1.25 * rank["megatron"][tensor], (head, tensor)
            if dtype == torch.float32:
                assert rank[head]["logp"] < rank["megatron"]["logp"]


@pytest.mark.parametrize("supervised", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_memory_is_a_tile_a_chunk_and_a_few_numbers_a_token(
    dtype: torch.dtype, supervised: float, monkeypatch: pytest.MonkeyPatch
):
    """With the fp32 `main_grad` of training: at most 64 bytes a token, whatever the width of the hidden states."""
    tile, chunk, v, h = 1 << 16, 512, 256, 128
    monkeypatch.setattr(linear_logprobs, "TILE_BYTES", tile)
    monkeypatch.setattr(linear_logprobs, "CPU_PRODUCT_ROWS", 64)
    short, long = 2048, 16384
    beyond = {}
    for n in (short, long):
        hidden = torch.randn(n, 1, h).to(dtype).requires_grad_()
        weight = torch.nn.Parameter(torch.randn(v, h).to(dtype))
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(v, h), False
        targets = torch.randint(v, (n, 1))
        targets[: round(n * (1 - supervised))] = reference.NONE
        with Peak(hidden, weight, weight.main_grad, targets) as peak:
            logp = vocab_parallel_linear_statistics(hidden, weight, targets, chunk_size=chunk, fuse_main_grad=True).logp
            torch.autograd.grad(logp.sum(), (hidden, weight))
        beyond[n] = peak.peak - hidden.nbytes - weight.nbytes  # less the gradients of both
    fixed = 3 * tile + chunk * h * 8  # a bf16 tile's arithmetic is in fp32, and so is its chunk's gradient
    assert 0 < beyond[short] <= fixed + 64 * short
    assert beyond[long] - beyond[short] <= 64 * (long - short)
