"""Compares loss heads, forward and backward: CPU time of one thread, peak memory, errors; prints tables, draws a plot.

    OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 python -m benchmarks.head --errors --plot docs/images/head.png
    ... python -m benchmarks.head 2048x49152:fp32 2048x576x49152:bf16:0.5:tp2 --heads Megatron ours

A case is rows x vocabulary (the logits are given) or rows x hidden x vocabulary (the product with the weight is timed
too), dtype, share of supervised rows (default 1), number of tensor-parallel processes. All heads get the same inputs,
and BFT's loss is computed from their log p. Heads take turns, and the minimum of the repetitions is reported, in CPU
time of the thread, because wall time means little on a shared machine. Memory is the peak of live tensor storage,
counted operation by operation: with the logits given, it includes them; otherwise it excludes the hidden states, the
weight and the gradients of both. The weight has an fp32 `main_grad`, as in training; the gradient of a head that does
not add to it itself is added to it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import peers
from benchmarks.measuring import in_processes
from bft_megatron.labels import IGNORE_INDEX
from bft_megatron.objective.loss import objective_sum
from bft_megatron.objective.records import bft
from bft_megatron.objective.view import Geometry
from tests.helpers.memory import Peak

DEFAULT_CASES = [
    f"{shape}:{dtype}{more}"
    for shape, mores in (
        ("2048x49152", ("", ":0.5", ":1:tp2")),
        ("1024x128256", ("",)),
        ("1024x576x49152", ("", ":0.5", ":1:tp2")),
    )
    for dtype in ("fp32", "bf16")
    for more in mores
]
Found = dict[str, tuple[float, float]]
"""head -> (seconds, peak MiB)."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """The sizes of a measurement; h is None if the logits are given."""

    s: int
    h: int | None
    v: int
    dtype: str
    share: float = 1.0
    tp: int = 1

    @staticmethod
    def parse(text: str) -> Case:
        """Parse `2048x576x49152:bf16:0.5:tp2`; the last two parts are optional."""
        shape, dtype, *more = text.split(":")
        share, tp = (more + ["1", "tp1"][len(more) :])[:2]
        sizes = [int(x) for x in shape.split("x")]
        s, h, v = sizes if len(sizes) == 3 else (sizes[0], None, sizes[1])
        return Case(s, h, v, dtype, float(share), int(tp.removeprefix("tp")))

    def __str__(self) -> str:
        shape = f"{self.s:,} x {self.v:,}" if self.h is None else f"{self.s:,} x {self.h:,} x {self.v:,}"
        share = "" if self.share == 1 else f", {self.share:.0%} supervised"
        return f"{shape} {self.dtype}{share}{'' if self.tp == 1 else f', TP {self.tp}'}"

    def targets(self) -> Tensor:
        """Return targets [s, 1] whose unsupervised rows come first, like a prompt."""
        targets = torch.randint(self.v, (self.s, 1), generator=torch.Generator().manual_seed(1))
        targets[: round(self.s * (1 - self.share))] = IGNORE_INDEX
        return targets


class Given(torch.autograd.Function):
    """Logits as a model's output: only the head holds a reference to them, and `taken` gets their gradient."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, source: Tensor, taken: list[Tensor]) -> Tensor:
        ctx.taken = taken
        return source.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.taken.append(gradient)
        return gradient.new_zeros(()), None, None


def loss_of(logp: Tensor, targets: Tensor) -> Tensor:
    """Return BFT's loss of one sample from log p [s, 1]."""
    geometry = Geometry(targets.flatten(), torch.tensor([0, len(targets)]), torch.tensor([True]), torch.ones(1))
    logp = logp.flatten()
    return objective_sum(bft, geometry, geometry.view(logp), logp).loss


class OverLogits:
    """The inputs of a case with given logits, and a step of a head on them."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(dist.get_rank())
        self.source = torch.randn(case.s, 1, case.v // case.tp, generator=generator).to(DTYPES[case.dtype])
        self.leaf, self.targets = torch.zeros((), dtype=self.source.dtype, requires_grad=True), case.targets()
        self.known, self.gradients = [self.source, self.leaf, self.targets], 0

    def step(self, head: peers.OverLogits) -> float:
        """Return the CPU seconds of a step, without creating the logits and releasing their gradient."""
        taken: list[Tensor] = []
        logits = Given.apply(self.leaf, self.source, taken)
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
        """Return the CPU seconds of a step."""
        start = time.thread_time()
        self.weight.grad_added_to_main_grad = False
        loss = loss_of(head(self.hidden, self.weight, self.targets), self.targets)
        _, d_weight = torch.autograd.grad(loss, (self.hidden, self.weight))
        if not self.weight.grad_added_to_main_grad:
            self.weight.main_grad.add_(d_weight)
        return time.thread_time() - start


def measure(case: Case, heads: dict[str, Callable[..., Tensor]], repetitions: int) -> Found:
    """Measure each head's time and peak memory on this rank."""
    given = OverLogits(case) if case.h is None else FromHidden(case)
    peaks = {}
    for name, head in heads.items():  # also the warm-up
        with Peak(*given.known) as peak:
            given.step(head)
        peaks[name] = (peak.peak - given.gradients) / 2**20
    seconds: dict[str, list[float]] = {name: [] for name in heads}
    for _ in range(repetitions):
        for name, head in heads.items():
            seconds[name].append(given.step(head))
    return {name: (min(seconds[name]), peaks[name]) for name in heads}


def report(cases: list[Case], prefixes: list[str], repetitions: int) -> dict[Case, Found]:
    """Print a Markdown table with a row per case; return each case's largest time and memory over the ranks."""
    every = peers.OVER_LOGITS if cases[0].h is None else peers.FROM_HIDDEN
    names = [name for name in every if name.startswith(tuple(prefixes))]
    print(f"\n| {'rows x ' + ('' if cases[0].h is None else 'hidden x ') + 'vocabulary'} | {' | '.join(names)} |")
    print(f"|{' --- |' * (len(names) + 1)}")
    found = {}
    for case in cases:
        heads = {name: every[name] for name in names if case.tp == 1 or name not in peers.UNSHARDED}
        ranks = in_processes(case.tp, measure, case, heads, repetitions)
        found[case] = {name: tuple(max(rank[name][i] for rank in ranks) for i in (0, 1)) for name in heads}
        print(f"| {case} | {' | '.join(_cell(name, found[case]) for name in names)} |", flush=True)
    return found


def _cell(name: str, found: Found) -> str:
    if name not in found:
        return "-"
    seconds, mib = found[name]
    time_ = f"{seconds:.2f} s" if name == peers.BASELINE else f"{seconds / found[peers.BASELINE][0]:.2f}x"
    return time_ if name in peers.TIME_ALONE else f"{time_}, {mib:,.0f} MiB"


def errors(dtype: str) -> None:
    """Print each head's error against float64 on the same inputs; half of the labels are likely, upstream is random."""
    n, h, v = 768, 512, 16000
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, 1, h, generator=generator), torch.randn(v, h, generator=generator) / h**0.5
    targets, upstream = torch.randint(v, (n, 1), generator=generator), torch.randn(n, 1, generator=generator)
    hidden[::2, 0] += 10 * weight[targets[::2, 0]]
    hidden, weight = (x.to(DTYPES[dtype]).requires_grad_() for x in (hidden, weight))

    def numbers(logp: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad((logp * upstream).sum(), inputs)
        return tuple(x.detach().double() for x in (logp, logp.exp(), *gradients))

    h64, w64 = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = numbers((h64 @ w64.t()).log_softmax(-1).gather(-1, targets[..., None])[..., 0], h64, w64)
    for name, head in peers.FROM_HIDDEN.items():
        found = numbers(head(hidden, weight, targets), hidden, weight)
        away = [x - y for x, y in zip(found, exact, strict=True)]
        cells = [x.square().mean().sqrt() for x in away[:2]]
        cells += [x.norm() / y.norm() for x, y in zip(away[2:], exact[2:], strict=True)]
        print(f"| {name}, {dtype} | {' | '.join(f'{float(x):.1e}' for x in cells)} |", flush=True)


def plot(found: dict[Case, Found], path: Path) -> None:
    """Draw a case of one process relative to Megatron: time and memory, one bar per head."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [case for case in found if case.tp == 1 and case.share == 1]
    names = [name for name in {**peers.OVER_LOGITS, **peers.FROM_HIDDEN} if any(name in found[c] for c in cases)]
    figure, panels = pyplot.subplots(2, 1, figsize=(11, 7), sharex=True, layout="constrained")
    for panel, i, what in zip(panels, (0, 1), ("CPU time", "peak memory"), strict=True):
        for at, name in enumerate(names):
            known = [(x, case) for x, case in enumerate(cases) if name in found[case]]
            if i and name in peers.TIME_ALONE:
                continue
            ratios = [found[case][name][i] / found[case][peers.BASELINE][i] for _, case in known]
            panel.bar([x + 0.11 * (at - len(names) / 2) for x, _ in known], ratios, 0.1, label=name)
        panel.axhline(1, color="black", linewidth=0.5)
        panel.set(yscale="log", ylabel=f"{what} / Megatron, unfused")
        panel.set_yticks(ticks := (0.1, 0.2, 0.5, 1, 2, 4), [f"{tick:g}x" for tick in ticks])
        panel.minorticks_off()
    panels[0].legend(ncols=4, fontsize="small")
    panels[1].set_xticks(range(len(cases)), [str(case).replace(" x ", "\u00d7") for case in cases], rotation=20)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print the tables of the cases, the errors and the plot as the options ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=DEFAULT_CASES)
    parser.add_argument("--heads", nargs="+", default=[""], help="beginnings of their names; Megatron's must be in it")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--errors", action="store_true", help="also hold every head to float64")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    options = parser.parse_args()
    asked = [head for head in peers.PACKAGES if options.errors or head.startswith(tuple(options.heads))]
    needed = [peers.PACKAGES[head] for head in asked] + ["matplotlib"] * bool(options.plot)
    if missing := [name for name in needed if find_spec(name) is None]:
        parser.error(f"{', '.join(missing)} not installed: pip install --group bench")
    if options.errors:
        print("| | log p, rms | p, rms | hidden gradient | weight gradient |\n| --- | --- | --- | --- | --- |")
        for dtype in DTYPES:
            in_processes(1, errors, dtype)
    cases, found = [Case.parse(case) for case in options.cases], {}
    for kind in ([c for c in cases if c.h is None], [c for c in cases if c.h is not None]):
        if kind:
            found |= report(kind, options.heads, options.repetitions)
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
