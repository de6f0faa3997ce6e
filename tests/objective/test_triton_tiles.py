"""The Triton kernels, in Triton's interpreter, against float64: both ways into the head, forward and backward.

The interpreter must be chosen before Triton is imported, which Megatron did long ago: a forked process imports it anew.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bft_megatron.objective import linear_logprobs
from bft_megatron.objective.linear_logprobs import vocab_parallel_linear_statistics
from bft_megatron.objective.logprobs import vocab_parallel_statistics
from tests.helpers import objective_reference as reference
from tests.helpers.world import run_world

CASES = {  # rows, v, vocabulary, rows without a label, scale of the logits
    "uneven mask": (9, 700, 650, (0, 1, 5), 3.0),
    "several blocks of columns, large logits": (2, 9000, 9000, (), 30.0),
    "all masked": (3, 64, 64, (0, 1, 2), 1.0),
    "one row, one column": (1, 8, 1, (), 1.0),
    "powers of two": (4, 64, 64, (3,), 3.0),
}
H = 16


def _inputs(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """hidden [n, 1, h], weight [v, h], targets, upstream gradient, vocabulary."""
    n, v, vocabulary, masked, scale = CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((n, 1, H), (v, H)))
    targets = torch.randint(vocabulary, (n, 1), generator=generator)
    targets[list(masked)] = reference.NONE
    return (hidden * scale / H**0.5).to(dtype), weight.to(dtype), targets, torch.randn(n, 1), vocabulary


def _interpreted() -> dict[Any, dict[str, Tensor]]:
    for name in list(sys.modules):
        if name.partition(".")[0] == "triton" and not name.startswith("triton._C"):
            del sys.modules[name]
    sys.modules.pop("bft_megatron.objective.triton_tiles", None)  # another test may have imported it with that Triton
    os.environ["TRITON_INTERPRET"] = "1"
    from bft_megatron.objective.triton_tiles import TRITON

    torch.manual_seed(0)
    linear_logprobs.TILE_BYTES = 4 * 9 * 64  # 64 columns of 9 rows: a tile's label is beyond another tile's last lane
    found = {}
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            hidden, weight, targets, upstream, vocabulary = _inputs(case, dtype)
            options = {"vocab_size": vocabulary, "entropy": True, "kernels": TRITON}
            for way in ("read", "overwrite", "chunked"):
                h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
                if way == "chunked":
                    statistics, inputs = vocab_parallel_linear_statistics(h, w, targets, **options), (h, w)
                else:
                    logits = h @ w.t()
                    inputs = (logits,)
                    statistics = vocab_parallel_statistics(logits, targets, overwrite=way == "overwrite", **options)
                gradients = torch.autograd.grad((statistics.logp * upstream).sum(), inputs)
                found[case, dtype, way] = {
                    "logits": (hidden @ weight.t()).double(),
                    "upstream": upstream,
                    "logp": statistics.logp.detach(),
                    "correct": statistics.correct,
                    "entropy": statistics.entropy,
                    "gradients": gradients,
                }
    return found


@pytest.fixture(scope="module")
def interpreted() -> dict[Any, dict[str, Tensor]]:
    return run_world(1, _interpreted)[0]


@pytest.mark.parametrize("way", ["read", "overwrite", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_as_float64(case: str, dtype: torch.dtype, way: str, interpreted: dict[Any, dict[str, Tensor]]):
    """The interpreter rounds a multiply-add twice, and to bf16 by cutting off."""
    hidden, weight, targets, _, vocabulary = _inputs(case, dtype)
    found = interpreted[case, dtype, way]
    logits = found["logits"].requires_grad_()
    logp = reference.logprobs(logits, targets, vocabulary)
    (d_logits,) = torch.autograd.grad((logp * found["upstream"]).sum(), logits)
    p, supervised = logits.detach()[..., :vocabulary].softmax(-1), targets != reference.NONE
    torch.testing.assert_close(found["logp"].double(), logp.detach(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(
        found["entropy"].double(), torch.special.entr(p).sum(-1) * supervised, rtol=1e-4, atol=2e-5
    )
    assert torch.equal(found["correct"], (p.argmax(-1) == targets) & supervised)
    expected = (d_logits,)
    if way == "chunked":
        expected = (d_logits @ weight.double(), d_logits[:, 0].T @ hidden[:, 0].double())
    for mine, theirs in zip(found["gradients"], expected, strict=True):
        tolerance = 2e-5 if dtype == torch.float32 else 2**-7
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()
        assert theirs.any() == mine.any()


SHARED_BYTES, REGISTERS = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}, 65536
"""Of a multiprocessor: the most shared memory that a program may ask for, by architecture, and all registers."""
RESIDENT = 4
"""Programs of one kernel that a multiprocessor must hold at once, so that some compute while others wait for memory."""


def _usage(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers of a thread, bytes of shared memory of a program and spilled bytes of a thread, by NVIDIA's tool."""
    from triton.backends import nvidia

    (folder / "kernel.cubin").write_bytes(cubin)
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    said = subprocess.run([tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True)
    return {name: int(re.findall(rf"\b{name}:(\d+)", said.stdout)[-1]) for name in ("REG", "SHARED", "LOCAL", "STACK")}


@pytest.mark.parametrize("kernel", ["_sums_of_row", "_gradient_of_row"])
@pytest.mark.parametrize("architecture", SHARED_BYTES)
def test_compiles_for_a_gpu(kernel: str, architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """To machine code, which takes no GPU, and within what one has; whether it is fast, only a GPU can tell."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bft_megatron.objective import triton_tiles

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(triton_tiles, kernel)
    kinds = {"X": "*bf16", "OUT": "*bf16", "HOLE": "*i64", "SUPERVISED": "*i8", "OTHERS": "*fp64", "WEIGHTED": "*fp64"}
    ((block, warps),) = triton_tiles.LAUNCHES.values()
    constants = {"ENTROPY": True, "BLOCK": block}
    signature = {
        name: "constexpr" if name in constants else "i32" if name.islower() else kinds.get(name, "*fp32")
        for name in function.arg_names
    }
    given = {(i,): constants[name] for i, name in enumerate(function.arg_names) if name in constants}
    compiled = triton.compile(
        ASTSource(function, signature, given), GPUTarget("cuda", architecture, 32), {"num_warps": warps}
    )
    assert "atom" not in compiled.asm["ptx"]
    assert "ex2.approx" in compiled.asm["ptx"]
    used = _usage(compiled.asm["cubin"], tmp_path)
    assert used["LOCAL"] == used["STACK"] == 0
    assert RESIDENT * used["SHARED"] <= SHARED_BYTES[architecture]
    assert RESIDENT * used["REG"] * 32 * warps <= REGISTERS
