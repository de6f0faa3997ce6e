"""The loss head, forward and backward, side by side: CPU time of one thread, peak memory, for the README's table.

    OMP_NUM_THREADS=1 python benchmarks/head.py 2048x576x49152:fp32 2048x576x49152:bf16 2048x576x49152:bf16:0.5

A case is rows x hidden x vocabulary, dtype, share of supervised rows (1 where left out). All heads get the same hidden
states and weight, and BFT's loss on top of their log p; the product with the weight is part of the time. Heads take
turns, the minimum of the repetitions counts, in thread_time: wall time means little on a machine that others use.
Memory is the peak of live tensor storage beyond inputs and their gradients, counted operation by operation.
"""

from __future__ import annotations

import argparse
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bft_megatron.objective import IGNORE_INDEX
from bft_megatron.objective.linear_logprobs import vocab_parallel_linear_logprobs
from bft_megatron.objective.logprobs import vocab_parallel_logprobs
from bft_megatron.objective.loss import objective_sum
from bft_megatron.objective.records import bft
from bft_megatron.objective.view import Rows

LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As the method's definition reads: the loss from one log-softmax in fp32, its weights from a second, detached."""
    logits = (hidden @ weight.t()).float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    with torch.no_grad():
        logp = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -loss.view(targets.shape) + (logp + loss.detach().view(targets.shape))


def megatron(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Megatron's unfused vocab-parallel cross entropy."""
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    loss = vocab_parallel_cross_entropy(hidden @ weight.t(), targets.clamp(min=0), tp_group=dist.group.WORLD)
    return -loss * (targets != IGNORE_INDEX)


def over_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Ours with logits."""
    return vocab_parallel_logprobs(hidden @ weight.t(), targets, overwrite=True)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Ours without."""
    return vocab_parallel_linear_logprobs(hidden, weight, targets)


HEADS: dict[str, LogProbs] = {
    "two log-softmaxes": plain,
    "Megatron, unfused": megatron,
    "ours, over logits": over_logits,
    "ours, chunked": chunked,
}


class Peak(TorchDispatchMode):
    """Counts the bytes of live tensor storages, of which `known` are none."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.sizes = {t.untyped_storage()._cdata: 0 for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_iter(result):
            if isinstance(t, Tensor):
                self._note(t.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)


def inputs(case: str) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [s, 1, h], weight [v, h], targets [s, 1]; the rows that are not supervised come first."""
    shape, dtype, *share = case.split(":")
    s, h, v = map(int, shape.split("x"))
    torch.manual_seed(0)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    hidden, weight = (torch.randn(*size).mul_(h**-0.25).to(kind).requires_grad_() for size in ((s, 1, h), (v, h)))
    targets = torch.randint(v, (s, 1))
    targets[: round(s * (1 - float(share[0] if share else 1)))] = IGNORE_INDEX
    return hidden, weight, targets


def step(head: LogProbs, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """BFT's loss on the head's log p -> the gradients of hidden states and weight."""
    rows = Rows(targets.flatten(), torch.tensor([0, len(targets)]), torch.tensor([True]), torch.ones(1))
    logp = head(hidden, weight, targets).flatten()
    return torch.autograd.grad(objective_sum(bft, rows, rows.view(logp), logp).loss, (hidden, weight))


def measure(case: str, repetitions: int) -> dict[str, tuple[float, float]]:
    """head -> (seconds, peak MiB)."""
    given = inputs(case)
    gradients = sum(t.nbytes for t in given[:2])
    seconds: dict[str, list[float]] = {name: [] for name in HEADS}
    for _ in range(repetitions):
        for name, head in HEADS.items():
            start = time.thread_time()
            step(head, *given)
            seconds[name].append(time.thread_time() - start)
    peaks = {}
    for name, head in HEADS.items():
        with Peak(*given) as peak:
            found = step(head, *given)
        peaks[name] = (peak.peak - gradients) / 2**20
        del found
    return {name: (min(seconds[name]), peaks[name]) for name in HEADS}


def main() -> None:
    """Print a markdown table, a row a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print(f"| rows x hidden x vocabulary | {' | '.join(HEADS)} |\n|{' --- |' * (len(HEADS) + 1)}")
    for case in options.cases:
        found = measure(case, options.repetitions)
        base = found["Megatron, unfused"][0]
        cells = [f"{s:.2f} s ({s / base:.2f}x), {mib:,.0f} MiB" for s, mib in found.values()]
        print(f"| {case.replace(':', ', ')} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
