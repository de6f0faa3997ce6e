"""The loss head, forward and backward, side by side: CPU time of one thread, peak memory, errors; tables and a plot.

    OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 python benchmarks/head.py            # the README's, an hour and a half
    ... python benchmarks/head.py 2048x49152:fp32 2048x576x49152:bf16:0.5:tp2 --errors --plot head.png

A case is rows x vocabulary (over logits that are there) or rows x hidden x vocabulary (the product with the weight is
part of the time), dtype, share of supervised rows (1 where left out), tensor-parallel processes. All heads get the same
inputs, and BFT's loss on top of their log p. Heads take turns, the minimum of the repetitions counts, in CPU time of
the thread: wall time means little on a machine that others use. Memory is the peak of live tensor storage, counted
operation by operation: with the logits, or beyond hidden states, weight and the gradients of both. The weight has an
fp32 `main_grad` beside it, as in training; who does not add to it itself has its gradient added to it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import peers
from benchmarks.measuring import Peak, in_processes
from bft_megatron.objective import IGNORE_INDEX
from bft_megatron.objective.loss import objective_sum
from bft_megatron.objective.records import bft
from bft_megatron.objective.view import Rows

DEFAULT_CASES = [
    *(f"{shape}:{dtype}{share}" for dtype in ("fp32", "bf16") for shape, share in (
        ("2048x32000", ""), ("2048x49152", ""), ("2048x49152", ":0.5"), ("1024x128256", ""), ("2048x49152", ":1:tp2"),
    )),
    *(f"{shape}:{dtype}{share}" for dtype in ("fp32", "bf16") for shape, share in (
        ("2048x576x49152", ""), ("2048x576x49152", ":0.5"), ("8192x576x32000", ""), ("1024x2048x128256", ""),
        ("2048x576x49152", ":1:tp2"),
    )),
]  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """What is measured; h is None over logits that are there."""

    s: int
    h: int | None
    v: int
    dtype: str
    share: float = 1.0
    tp: int = 1

    @staticmethod
    def parse(text: str) -> Case:
        """`2048x576x49152:bf16:0.5:tp2`, of which the last two may be left out."""
        shape, dtype, share, tp = [*text.split(":"), "1", "tp1"][:4] if text.count(":") < 3 else text.split(":")
        sizes = [int(x) for x in shape.split("x")]
        s, h, v = sizes if len(sizes) == 3 else (sizes[0], None, sizes[1])
        return Case(s, h, v, dtype, float(share), int(tp.removeprefix("tp")))

    def __str__(self) -> str:
        shape = f"{self.s:,} x {self.v:,}" if self.h is None else f"{self.s:,} x {self.h:,} x {self.v:,}"
        share = "" if self.share == 1 else f", {self.share:.0%} supervised"
        return f"{shape} {self.dtype}{share}{'' if self.tp == 1 else f', TP {self.tp}'}"

    @property
    def heads(self) -> dict[str, Callable[..., Tensor]]:
        """Those that can run it."""
        every = peers.OVER_LOGITS if self.h is None else peers.FROM_HIDDEN
        return {name: head for name, head in every.items() if self.tp == 1 or name not in peers.UNSHARDED}

    def targets(self) -> Tensor:
        """[s, 1]; the rows that are not supervised come first, as a prompt does."""
        targets = torch.randint(self.v, (self.s, 1), generator=torch.Generator().manual_seed(1))
        targets[: round(self.s * (1 - self.share))] = IGNORE_INDEX
        return targets


class _Given(torch.autograd.Function):
    """Logits that something made, as a model does: nothing but the head holds them, and `taken` gets their gradient."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, source: Tensor, taken: list[Tensor]) -> Tensor:
        ctx.taken = taken
        return source.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.taken.append(gradient)
        return gradient.new_zeros(()), None, None


def loss_of(logp: Tensor, targets: Tensor) -> Tensor:
    """BFT's loss on log p [s, 1]: one sample."""
    rows = Rows(targets.flatten(), torch.tensor([0, len(targets)]), torch.tensor([True]), torch.ones(1))
    logp = logp.flatten()
    return objective_sum(bft, rows, rows.view(logp), logp).loss


class OverLogits:
    """The inputs of a case over logits, and a step of a head on them."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(dist.get_rank())
        self.source = torch.randn(case.s, 1, case.v // case.tp, generator=generator).to(DTYPES[case.dtype])
        self.leaf, self.targets = torch.zeros((), dtype=self.source.dtype, requires_grad=True), case.targets()
        self.known, self.gradients = [self.source, self.leaf, self.targets], 0

    def step(self, head: peers.OverLogits) -> float:
        """-> CPU seconds, without the making of the logits and the release of their gradient."""
        taken: list[Tensor] = []
        logits = _Given.apply(self.leaf, self.source, taken)
        start = time.thread_time()
        loss = loss_of(head(logits, self.targets), self.targets)
        del logits
        loss.backward()
        return time.thread_time() - start


class FromHidden:
    """The inputs of a case with hidden states and weight, and a step of a head on them."""

    def __init__(self, case: Case) -> None:
        generator, dtype = torch.Generator().manual_seed(0), DTYPES[case.dtype]
        hidden = torch.randn(case.s, 1, case.h, generator=generator).mul_(case.h**-0.5)
        weight = torch.randn(case.v, case.h, generator=generator).chunk(case.tp)[dist.get_rank()]
        self.hidden, self.targets = hidden.to(dtype).requires_grad_(), case.targets()
        self.weight = torch.nn.Parameter(weight.to(dtype, copy=True))
        self.weight.main_grad = torch.zeros(weight.shape)
        self.known = [self.hidden, self.targets, self.weight, self.weight.main_grad]
        self.gradients = self.hidden.nbytes + self.weight.nbytes

    def step(self, head: peers.FromHidden) -> float:
        """-> CPU seconds."""
        start = time.thread_time()
        self.weight.grad_added_to_main_grad = False
        loss = loss_of(head(self.hidden, self.weight, self.targets), self.targets)
        _, d_weight = torch.autograd.grad(loss, (self.hidden, self.weight))
        if not self.weight.grad_added_to_main_grad:
            self.weight.main_grad.add_(d_weight)
        return time.thread_time() - start


def measure(case: Case, repetitions: int) -> dict[str, tuple[float, float]]:
    """On a rank: head -> (seconds, peak MiB)."""
    given = OverLogits(case) if case.h is None else FromHidden(case)
    peaks = {}
    for name, head in case.heads.items():  # first, and so the warm-up
        with Peak(*given.known) as peak:
            given.step(head)
        peaks[name] = (peak.peak - given.gradients) / 2**20
    seconds: dict[str, list[float]] = {name: [] for name in case.heads}
    for _ in range(repetitions):
        for name, head in case.heads.items():
            seconds[name].append(given.step(head))
    return {name: (min(seconds[name]), peaks[name]) for name in case.heads}


def report(cases: list[Case], repetitions: int) -> dict[Case, dict[str, tuple[float, float]]]:
    """Print a markdown table, a row a case -> case -> head -> (seconds, MiB) of the rank that has most of either."""
    names = list(peers.OVER_LOGITS if cases[0].h is None else peers.FROM_HIDDEN)
    print(f"\n| {'rows x ' + ('' if cases[0].h is None else 'hidden x ') + 'vocabulary'} | {' | '.join(names)} |")
    print(f"|{' --- |' * (len(names) + 1)}")
    found = {}
    for case in cases:
        ranks = in_processes(case.tp, measure, case, repetitions)
        found[case] = {name: tuple(max(rank[name][i] for rank in ranks) for i in (0, 1)) for name in case.heads}
        print(f"| {case} | {' | '.join(_cell(name, found[case]) for name in names)} |", flush=True)
    return found


def _cell(name: str, found: dict[str, tuple[float, float]]) -> str:
    if name not in found:
        return "-"
    seconds, mib = found[name]
    ratio = f"{seconds / found[peers.BASELINE][0]:.2f}x"
    time_ = f"{seconds:.2f} s ({ratio})" if name == peers.BASELINE else ratio
    return time_ if name in peers.TIME_ALONE else f"{time_}, {mib:,.0f} MiB"


def main() -> None:
    """Print the tables of the cases, and what else was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=DEFAULT_CASES)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    cases = [Case.parse(case) for case in options.cases]
    for kind in ([c for c in cases if c.h is None], [c for c in cases if c.h is not None]):
        if kind:
            report(kind, options.repetitions)


if __name__ == "__main__":
    main()
