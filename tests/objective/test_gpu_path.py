"""The head as a GPU runs it with torch's operators, without one: its numbers, its passes over memory, no waiting.

Tensors of the `meta` device go the way of a GPU's and have no values: whatever would make the host wait for a value, an
`item`, a `bool`, a `nonzero` or a copy to the host, raises there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bft_megatron.labels import IGNORE_INDEX
from bft_megatron.objective import sums
from bft_megatron.objective.linear_logprobs import vocab_parallel_linear_statistics
from bft_megatron.objective.logprobs import vocab_parallel_statistics

ROWS, V, H = 2048, 65_536, 64
BLOCKS = ROWS * V * 4 // sums.DEVICE_BLOCK_BYTES
FREE = {"aten::gather", "aten::scatter_", "aten::new_empty", "aten::empty_like", "aten::detach", "aten::new_zeros"}
"""They touch a number a row, or no memory at all."""


class Passes(TorchDispatchMode):
    """Counts bytes that operators read from and write to tensors of a block and more, and those operators."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema = func._schema
        if func.is_view or schema.name in FREE:
            return result
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        touched = 0
        for argument in schema.arguments:
            x, written = given.get(argument.name), argument.alias_info is not None and argument.alias_info.is_write
            if isinstance(x, Tensor) and x.numel() * 4 >= sums.DEVICE_BLOCK_BYTES:
                overwritten = written and (argument.is_out or schema.name == "aten::copy_")
                touched += x.nbytes * (1 if overwritten or not written else 2)
        self.bytes, self.launches = self.bytes + touched, self.launches + (touched > 0)
        return result


def _counted(dtype: torch.dtype, *, entropy: bool = False, overwrite: bool = True) -> list[tuple[float, float]]:
    """Bytes an element and operators a block, forward and backward."""
    leaf = torch.empty(ROWS, 1, V, dtype=dtype, device="meta", requires_grad=True)
    logits, targets = leaf.clone(), torch.zeros(ROWS, 1, dtype=torch.int64, device="meta")
    with Passes() as forward:
        found = vocab_parallel_statistics(logits, targets, overwrite=overwrite, entropy=entropy)
    with Passes() as backward:
        torch.autograd.grad(found.logp, logits, torch.empty(ROWS, 1, device="meta"))
    return [(each.bytes / (ROWS * V), each.launches / BLOCKS) for each in (forward, backward)]


@pytest.mark.parametrize(
    ("dtype", "options", "passes"),
    [
        (torch.bfloat16, {}, [(24, 5), (20, 3)]),
        (torch.bfloat16, {"overwrite": False}, [(24, 5), (20, 3)]),
        (torch.bfloat16, {"entropy": True}, [(24 + 24, 8), (20, 3)]),
        (torch.float32, {}, [(24, 4), (8, 1)]),
        (torch.float32, {"overwrite": False}, [(32, 5), (24, 3)]),
    ],
)
def test_passes_over_memory(dtype: torch.dtype, options: dict[str, bool], passes: list[tuple[int, int]]):
    """The formulas of docs/costs.md, counted."""
    assert _counted(dtype, **options) == passes


@pytest.mark.parametrize("head", ["logits", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nothing_waits_for_a_value(head: str, dtype: torch.dtype):
    if head == "chunked" and dtype == torch.bfloat16 and Version(torch.__version__) < Version("2.12"):
        pytest.skip("torch 2.11 fails in the product of tensors without values that has another dtype than they")
    targets = torch.zeros(ROWS, 1, dtype=torch.int64)
    targets[::3] = IGNORE_INDEX
    hidden = torch.empty(ROWS, 1, H, dtype=dtype, device="meta", requires_grad=True)
    weight = torch.empty(V, H, dtype=dtype, device="meta", requires_grad=True)
    if head == "chunked":
        found = vocab_parallel_linear_statistics(hidden, weight, targets, chunk_size=512, entropy=True)
    else:
        found = vocab_parallel_statistics(hidden @ weight.t(), targets.to("meta"), overwrite=True, entropy=True)
    gradients = torch.autograd.grad(found.logp.sum(), (hidden, weight))
    assert [x.device.type for x in (found.correct, found.entropy, *gradients)] == ["meta"] * 4
    with pytest.raises(RuntimeError):
        bool(found.correct[0])


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_numbers_are_the_cpus(entropy: bool, overwrite: bool, monkeypatch: pytest.MonkeyPatch):
    """Operators that widen bf16 as they read it, as on a GPU, give the bits of those that first copy it."""
    generator = torch.Generator().manual_seed(3)
    logits = (5 * torch.randn(40, 1, 999, generator=generator)).bfloat16()
    targets = torch.randint(999, (40, 1), generator=generator)
    logits[::3, 0].scatter_(-1, targets[::3], 90.0)  # a label's own numerator is beyond fp32
    targets[5:9] = IGNORE_INDEX
    upstream, results = torch.randn(40, 1, generator=generator), []
    for slow in (True, False):
        monkeypatch.setattr(sums, "_is_slow_to_widen", lambda rows, slow=slow: slow and rows.dtype != torch.float32)
        leaf = logits.clone().requires_grad_()
        found = vocab_parallel_statistics(leaf * 1, targets, overwrite=overwrite, entropy=entropy)
        (gradient,) = torch.autograd.grad((found.logp * upstream).sum(), leaf)
        results.append([found.logp, found.correct, gradient, *([found.entropy] if entropy else [])])
    for x, y in zip(*results, strict=True):
        assert x.isfinite().all()
        assert torch.equal(x, y)
