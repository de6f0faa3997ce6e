"""The loss head on one GPU, forward and backward, side by side: time, peak memory, errors, share of the card's limits.

    python -m benchmarks.gpu.head                                   # the table in docs/
    python -m benchmarks.gpu.head 8192x128256:bf16:0.5 8192x4096x128256:bf16 --json head.json

Cases are those of benchmarks/head.py. Heads take turns on the same inputs, with BFT's loss on top of their log p; time
is the median of CUDA events around forward and backward. Memory is the allocator's peak: over logits with them, else
beyond hidden states, weight, its fp32 `main_grad` and both gradients. A head's limit over logits is three passes over
them at the speed of a copy (a read forward, a read and a write backward); with the product it is the three products
that any head needs, at the speed of a large square one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import peers
from benchmarks.head import Case, Given, loss_of
from bft_megatron.labels import IGNORE_INDEX
from bft_megatron.objective.linear_logprobs import vocab_parallel_linear_statistics
from bft_megatron.objective.logprobs import vocab_parallel_statistics
from bft_megatron.objective.triton_tiles import TRITON

CASES = [
    f"{shape}:bf16{share}"
    for shape in ("8192x128256", "8192x4096x128256", "16384x152064", "16384x3584x152064")
    for share in ("", ":0.5")
]
WARM_UP, REPETITIONS = 3, 20
ERROR_ROWS = 1024


def compiled(logits: Tensor, targets: Tensor) -> Tensor:
    """`torch.compile` of torch's own cross entropy in fp32, a loss a token."""
    return -_compiled(logits.flatten(0, 1), targets.flatten()).view(targets.shape)


@torch.compile(dynamic=False)
def _compiled(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none", ignore_index=IGNORE_INDEX)


def ours_triton(logits: Tensor, targets: Tensor) -> Tensor:
    """`objective.kernels: triton` over logits."""
    return vocab_parallel_statistics(logits, targets, overwrite=True, kernels=TRITON).logp


def chunked_triton(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`objective.head: chunked`, `objective.kernels: triton`."""
    return vocab_parallel_linear_statistics(hidden, weight, targets, fuse_main_grad=True, kernels=TRITON).logp


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Liger's fused linear cross entropy, a loss a token."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss = liger_fused_linear_cross_entropy(
        hidden.flatten(0, 1), weight, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return -loss.view(targets.shape)


def cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """cut-cross-entropy's own kernels, a loss a token; by default it leaves out small gradients."""
    from cut_cross_entropy import linear_cross_entropy

    loss = linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten(), reduction="none", impl="cce")
    return -loss.view(targets.shape)


OVER_LOGITS: dict[str, peers.OverLogits] = {
    **peers.OVER_LOGITS,
    "torch.compile": compiled,
    "ours, over logits, Triton": ours_triton,
}
FROM_HIDDEN: dict[str, peers.FromHidden] = {
    **{name: peers.with_product(head) for name, head in OVER_LOGITS.items()},
    "ours, chunked": peers.ours_chunked,
    "ours, chunked, Triton": chunked_triton,
    "Liger": liger,
    "cut-cross-entropy": cut_cross_entropy,
}
ON_CPU = {"ours, chunked", "ours, chunked, Triton"}
"""Heads that want the targets on the CPU, so that the GPU is not waited for."""


class Inputs:
    """A case's tensors on the GPU, and a step of a head on them."""

    def __init__(self, case: Case) -> None:
        self.case, self.targets = case, case.targets().pin_memory()
        self.on_device = self.targets.cuda()
        g = torch.Generator("cuda").manual_seed(0)
        dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
        if case.h is None:
            self.source = torch.randn(case.s, 1, case.v, generator=g, device="cuda", dtype=dtype)
            self.leaf = torch.zeros((), dtype=dtype, device="cuda", requires_grad=True)
        else:
            hidden = torch.randn(case.s, 1, case.h, generator=g, device="cuda").mul_(case.h**-0.5)
            self.hidden = hidden.to(dtype).requires_grad_()
            self.weight = torch.nn.Parameter(torch.randn(case.v, case.h, generator=g, device="cuda").to(dtype))
            self.weight.main_grad = torch.zeros(case.v, case.h, device="cuda")

    def step(self, head: Callable[..., Tensor], targets: Tensor) -> tuple[float, int]:
        """-> milliseconds, and the peak of allocated bytes above what was there before."""
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.case.h is None:
            taken: list[Tensor] = []
            logits = Given.apply(self.leaf, self.source, taken)
            start.record()
            loss = loss_of(head(logits, targets), self.targets)
            del logits
            loss.backward()
            gradients = 0
        else:
            self.weight.grad_added_to_main_grad = False
            start.record()
            loss = loss_of(head(self.hidden, self.weight, targets), self.targets)
            found = torch.autograd.grad(loss, (self.hidden, self.weight))
            if not self.weight.grad_added_to_main_grad:
                self.weight.main_grad.add_(found[1])
            gradients = sum(x.nbytes for x in found)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end), torch.cuda.max_memory_allocated() - before - gradients


def limits() -> dict[str, float]:
    """The card's measured limits: bytes a second of a copy, read and written, and FLOP/s of a bf16 product."""
    return {"copy": copy_speed(), "product": product_speed()}


def copy_speed() -> float:
    """Bytes a second of a copy of 2 GiB, read and written."""
    x = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    return 2 * x.nbytes / (1e-3 * median(lambda: x.clone()))


def product_speed() -> float:
    """FLOP/s of a large square product of bf16."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / (1e-3 * median(lambda: a @ a))


def speeds(limit: dict[str, float]) -> str:
    """The limits in a line."""
    return f"copy {limit['copy'] / 1e12:.2f} TB/s, product {limit['product'] / 1e12:.0f} TFLOP/s"


def median(call: Callable[[], Any]) -> float:
    """Milliseconds of a call by CUDA events, after a warm-up."""
    times = []
    for _ in range(WARM_UP + REPETITIONS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[WARM_UP:])


def floor_ms(case: Case, limit: dict[str, float]) -> float:
    """Milliseconds that a head cannot beat; rows without a label cost it nothing."""
    rows = round(case.s * case.share)
    if case.h is None:
        size = 2 if case.dtype == "bf16" else 4
        return 1e3 * 3 * size * rows * case.v / limit["copy"]
    return 1e3 * 3 * 2 * rows * case.h * case.v / limit["product"]


def measure(case: Case, limit: dict[str, float]) -> dict[str, dict[str, float | str]]:
    """Run every head of a case -> head -> ms, MiB, share of the limit; or why it failed."""
    given, heads = Inputs(case), OVER_LOGITS if case.h is None else FROM_HIDDEN
    found: dict[str, dict[str, float | str]] = {}
    times: dict[str, list[float]] = {}
    for name, head in heads.items():
        targets = given.targets if name in ON_CPU else given.on_device
        try:
            peaks = [given.step(head, targets)[1] for _ in range(WARM_UP)]
        except Exception as e:
            found[name] = {"failed": f"{type(e).__name__}: {str(e).splitlines()[0][:80]}"}
            continue
        times[name], found[name] = [], {"MiB": peaks[-1] / 2**20}
    for _ in range(REPETITIONS):
        for name, own in times.items():
            targets = given.targets if name in ON_CPU else given.on_device
            own.append(given.step(heads[name], targets)[0])
    for name, own in times.items():
        ms = statistics.median(own)
        found[name] |= {"ms": ms, "share": floor_ms(case, limit) / ms}
    return found


def errors(case: Case) -> dict[str, dict[str, float]]:
    """Distance to float64 by norm: log p, and the gradients of the logits or of hidden states and weight."""
    small = Case(ERROR_ROWS, case.h, case.v, case.dtype)
    given = Inputs(small)
    inputs = (given.source,) if small.h is None else (given.hidden, given.weight)
    upstream = torch.randn(ERROR_ROWS, 1, generator=torch.Generator().manual_seed(2)).cuda()
    exact = [x.detach().double().requires_grad_() for x in inputs]
    logits = exact[0] if small.h is None else exact[0] @ exact[1].t()
    logp = logits.log_softmax(-1).gather(-1, given.on_device[..., None])[..., 0]
    want = [logp.detach(), *torch.autograd.grad((logp * upstream).sum(), exact)]
    del logits, exact
    found = {}
    for name, head in (OVER_LOGITS if small.h is None else FROM_HIDDEN).items():
        own = [x.detach().clone().requires_grad_() for x in inputs]
        try:
            out = head(
                *([own[0] * 1] if small.h is None else own), given.targets if name in ON_CPU else given.on_device
            )
            got = [out.detach(), *torch.autograd.grad((out * upstream).sum(), own)]
        except Exception:
            continue
        names = ("log p", "gradient") if small.h is None else ("log p", "hidden gradient", "weight gradient")
        found[name] = {n: float((x - y).norm() / y.norm()) for n, x, y in zip(names, got, want, strict=True)}
    return found


def table(case: Case, found: dict[str, dict[str, Any]], away: dict[str, dict[str, float]]) -> str:
    """A markdown table of one case, a row a head; times are also ratios to Megatron's unfused cross entropy."""
    columns = list(next(iter(away.values())))
    lines = [f"| {case} | ms | | of the limit | peak MiB | {' | '.join(f'{c}, error' for c in columns)} |"]
    lines.append("|" + " --- |" * (5 + len(columns)))
    base = found[peers.BASELINE].get("ms")
    for name, row in found.items():
        if "failed" in row:
            lines.append(f"| {name} | {row['failed']} |" + " |" * (3 + len(columns)))
            continue
        ratio = f"{row['ms'] / base:.2f}x" if base else ""
        cells = [f"{row['ms']:.2f}", ratio, f"{row['share']:.0%}", f"{row['MiB']:,.0f}"]
        cells += [f"{away[name][c]:.1e}" if name in away else "" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(everything: dict[str, Any]) -> str:
    """The tables of all cases that were measured."""
    cases = everything["cases"].items()
    return "\n\n".join(table(Case.parse(text), found["heads"], found["errors"]) for text, found in cases)


def main() -> None:
    """Print a table a case, and write all numbers as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    os.environ.update(
        RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ.get("MASTER_PORT", "29611")
    )
    dist.init_process_group("nccl", rank=0, world_size=1, device_id=torch.device("cuda", 0))
    limit, name = limits(), torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}: {speeds(limit)}")
    everything: dict[str, Any] = {"card": name, "torch": torch.__version__, "limits": limit, "cases": {}}
    away: dict[tuple[int | None, int, str], dict[str, dict[str, float]]] = {}
    for text in options.cases:
        case = Case.parse(text)
        key = (case.h, case.v, case.dtype)
        away[key] = away.get(key) or errors(case)
        everything["cases"][text] = {"heads": measure(case, limit), "errors": away[key]}
        print(f"\n{tables(everything | {'cases': {text: everything['cases'][text]}})}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(everything, indent=1))
        torch.cuda.empty_cache()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
