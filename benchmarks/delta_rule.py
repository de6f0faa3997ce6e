"""Compares gated delta rules in torch, forward and backward: CPU time of one thread, and error; prints a table.

    OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 python -m benchmarks.delta_rule
    ... python -m benchmarks.delta_rule 16x32x128x128:fp32:512,17x30

A case is key heads x value heads x key width x value width, dtype, lengths of the row's samples (`17x30` are 17 samples
of 30 tokens). Ours takes the packed row; transformers' and Megatron's take one sample at a time, since they know no
packed rows, with their calls and the joining of their outputs in the time. Rules take turns, and the minimum of the
repetitions is reported, in CPU time of the thread. The error is the distance to our rule in float64, by norm, of the
output and of the gradients together. On a GPU flash-linear-attention's is measured too where it is installed, and time
is that of CUDA events.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from megatron.core.ssm.gated_delta_net.common import torch_chunk_gated_delta_rule as megatrons_rule
from torch import Tensor
from transformers import logging
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule as transformers_rule

from bft_megatron.layers import delta_rule

DEFAULT_CASES = [f"16x32x128x128:{row}" for row in ("fp32:512", "fp32:4x128", "fp32:17x30", "bf16:17x30")]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BASELINE = "transformers"
Rule = Callable[[list[Tensor], Tensor], Tensor]
"""q, k, v, g, beta [1, s, n, ...] and the edges of the samples -> outputs [1, s, n, dv]."""


@dataclass(frozen=True)
class Case:
    """The sizes of a measurement."""

    keys: int
    values: int
    dk: int
    dv: int
    dtype: str
    lengths: tuple[int, ...]

    @staticmethod
    def parse(text: str) -> Case:
        """Parse `16x32x128x128:fp32:512,17x30`."""
        shape, dtype, lengths = text.split(":")
        counted = [part.split("x") if "x" in part else ["1", part] for part in lengths.split(",")]
        row = tuple(int(length) for count, length in counted for _ in range(int(count)))
        keys, values, dk, dv = map(int, shape.split("x"))
        return Case(keys, values, dk, dv, dtype, row)

    def __str__(self) -> str:
        n, s = len(self.lengths), sum(self.lengths)
        row = f"{s:,} tokens in {n} samples" if n > 1 else f"{s:,} tokens"
        return f"{row}, {self.dtype}"

    def inputs(self) -> list[Tensor]:
        """Return q, k, v, g and beta, as a layer makes them: q and k of length one, repeated for the value heads."""
        generator, s = torch.Generator().manual_seed(1), sum(self.lengths)

        def draw(*shape: int) -> Tensor:
            return torch.randn(1, s, *shape, generator=generator)

        q, k = (torch.nn.functional.normalize(draw(self.keys, self.dk), dim=-1) for _ in range(2))
        q, k = (x.repeat_interleave(self.values // self.keys, 2) for x in (q, k))
        drawn = [q, k, draw(self.values, self.dv), -draw(self.values).abs(), draw(self.values).sigmoid()]
        kept = [x.to(DEVICE, DTYPES[self.dtype]) for x in drawn]
        return [*kept[:3], kept[3].float(), kept[4]]  # the logarithm of the decay is fp32

    def edges(self) -> Tensor:
        """Return the edges of the samples, [samples + 1] int32."""
        return torch.tensor([0, *self.lengths], device=DEVICE).cumsum(0).int()


def ours(row: list[Tensor], edges: Tensor) -> Tensor:
    """The rule of this package, over the packed row."""
    return delta_rule.chunk_gated_delta_rule(*row, cu_seqlens=edges)[0]


def by_sample(rule: Callable[..., tuple[Tensor, Tensor | None]]) -> Rule:
    """Return a rule that takes the row's samples one after the other."""

    def one_by_one(row: list[Tensor], edges: Tensor) -> Tensor:
        samples = zip(*(x.split(edges.diff().tolist(), 1) for x in row), strict=True)
        return torch.cat([rule(*sample)[0] for sample in samples], 1)

    return one_by_one


def rules() -> dict[str, Rule]:
    """Return the rules that run on this machine by name."""
    found: dict[str, Rule] = {
        BASELINE: by_sample(transformers_rule),
        "Megatron": by_sample(megatrons_rule),
        "ours": ours,
    }
    if DEVICE == "cuda" and find_spec("fla"):
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        found["flash-linear-attention"] = lambda row, edges: chunk_gated_delta_rule(*row, cu_seqlens=edges.long())[0]
    return found


def step(rule: Rule, row: list[Tensor], edges: Tensor) -> tuple[float, list[Tensor]]:
    """Return the seconds of a forward and backward pass, and its output and gradients."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if DEVICE == "cuda" else (None, None)
    if start is not None:
        start.record()
    begin = time.thread_time()
    out = rule(row, edges)
    gradients = torch.autograd.grad(out, row, torch.ones_like(out))
    seconds = time.thread_time() - begin
    if start is not None and stop is not None:
        stop.record()
        torch.cuda.synchronize()
        seconds = start.elapsed_time(stop) / 1e3
    return seconds, [out.detach(), *gradients]


def away(found: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest distance of an output or a gradient, relative by norm."""
    return max(float((x.double() - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True))


def measure(case: Case, repetitions: int) -> dict[str, tuple[float, float]]:
    """Return each rule's seconds and error."""
    row, edges = [x.requires_grad_() for x in case.inputs()], case.edges()
    _, exact = step(ours, [x.detach().double().requires_grad_() for x in row], edges)
    errors = {name: away(step(rule, row, edges)[1], exact) for name, rule in rules().items()}  # also the warm-up
    seconds: dict[str, list[float]] = {name: [] for name in errors}
    for _ in range(repetitions):
        for name, rule in rules().items():
            seconds[name].append(step(rule, row, edges)[0])
    return {name: (min(seconds[name]), errors[name]) for name in errors}


def main() -> None:
    """Print a Markdown table with a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=DEFAULT_CASES)
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()  # transformers', which warns of each call without flash-linear-attention
    print(f"| a row of | {' | '.join(rules())} |\n|{' --- |' * (1 + len(rules()))}")
    for case in map(Case.parse, options.cases):
        found = measure(case, options.repetitions)
        base = found[BASELINE][0]
        times = {name: f"{s:.3f} s" if name == BASELINE else f"{s / base:.2f}x" for name, (s, _) in found.items()}
        print(f"| {case} | {' | '.join(f'{times[name]}, {found[name][1]:.1e}' for name in found)} |", flush=True)


if __name__ == "__main__":
    main()
