"""Compares whole training steps by their loss: sft, dft and bft against Megatron's own plain loss; CPU time.

    OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 python -m benchmarks.step recipes/tiny.yaml
    ... python -m benchmarks.step recipes/cpu_demo.yaml parallel.tensor=1 train.global_batch_size=1 --rounds 3

One run of Megatron's training loop in one process, in which the losses take turns, step by step, on the same model; the
minimum over a loss's steps is reported, in CPU time of the thread. Megatron's loss is what `GPTModel` returns for
labels: vocab-parallel cross entropy, averaged over tokens. The last line is the objective alone: weights and loss of
8,192 tokens.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.measuring import in_processes
from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.hub import find_model
from bft_megatron.objective.loss import objective_sum
from bft_megatron.objective.records import bft
from bft_megatron.objective.view import Geometry
from bft_megatron.processes.terminal import output_to
from bft_megatron.recipe import reader
from bft_megatron.recipe.schema import ObjectiveSettings, Recipe
from bft_megatron.run.folder import RunFolder
from bft_megatron.run.prepared import prepare_rows
from bft_megatron.run.resolved import Run
from bft_megatron.training import loop
from bft_megatron.training.batch import Batch
from bft_megatron.training.step import LossFunction, Step

PLAIN = "Megatron's loss"
LOSSES = [PLAIN, "sft", "dft", "bft"]


class TakingTurns(Step):
    """A training step whose loss changes from step to step."""

    def __init__(self, settings: ObjectiveSettings, *args: Any) -> None:
        super().__init__(replace(settings, name="bft"), *args)
        self.steps = {name: Step(replace(settings, name=name), *args) for name in LOSSES if name != PLAIN}
        self.turn = PLAIN

    def forward(
        self, data_iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module
    ) -> tuple[Tensor, LossFunction]:
        """Run `Step.forward` with the loss whose turn it is."""
        if self.turn != PLAIN:
            return self.steps[self.turn].forward(data_iterator, model)
        batch = Batch(**next(data_iterator))
        labels = batch.labels
        losses = model(
            batch.tokens.cuda(),
            batch.position_ids.cuda(),
            None,
            labels=labels.clamp(min=0).cuda(),
            packed_seq_params=batch.packed_seq_params(),
        )
        return losses, partial(_plain_loss, (labels >= 0).cuda())


def _plain_loss(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    total, count = (losses * mask).sum(), mask.sum().int()
    return total, count, {"loss": torch.stack((total.detach(), count.float()))}


def measure(made: Recipe) -> dict[str, float]:
    """Return the seconds of each loss's fastest step, the first excluded; runs in a single rank."""
    from megatron.training import training

    seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
    turns: list[TakingTurns] = []
    whole_step = training.train_step

    def timed(*args: Any, **kwargs: Any) -> Any:
        step = turns[0]
        step.turn = LOSSES[sum(map(len, seconds.values())) % len(LOSSES)]
        start = time.thread_time()
        result = whole_step(*args, **kwargs)
        seconds[step.turn].append(time.thread_time() - start)
        return result

    def kept(*args: Any) -> TakingTurns:
        turns.append(TakingTurns(*args))
        return turns[0]

    training.train_step, loop.Step = timed, kept
    model = find_model(made.model)
    config = read_config(model)
    prepared = prepare_rows(made, model, config.vocab_size)
    with output_to(RunFolder.of(made).log(0)) as console:
        loop.train(Run(made, config, model, prepared, dist.get_world_size()), console)
    return {name: min(found[1:]) for name, found in seconds.items()}


def objective_alone(tokens: int = 8192, samples: int = 16) -> float:
    """Return the milliseconds of BFT's weights and loss for a packed row, forward and backward."""
    edges = torch.arange(samples + 1) * (tokens // samples)
    geometry = Geometry(torch.zeros(tokens, dtype=torch.int64), edges, torch.ones(samples) > 0, torch.ones(samples))
    logp = -torch.rand(tokens)

    def once() -> float:
        x = logp.clone().requires_grad_()
        start = time.thread_time()
        objective_sum(bft, geometry, geometry.view(x), x).loss.backward()
        return time.thread_time() - start

    return 1e3 * min(once() for _ in range(20))


def main() -> None:
    """Print a Markdown table of the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", help="fields of the recipe, key=value")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each loss; the first does not count")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        steps = f"train.iterations={len(LOSSES) * options.rounds}"
        fixed = [
            "device=cpu",
            "data.valid=null",
            "train.epochs=null",
            steps,
            "train.warmup_iterations=0",
            f"output={folder}/run",
        ]
        made = reader.load(options.recipe, options.overrides + fixed)
        (found,) = in_processes(1, measure, made)
    print("| loss | seconds a step | |\n| --- | --- | --- |")
    for name, seconds in found.items():
        print(f"| {name} | {seconds:.3f} | {seconds / found[PLAIN]:.2f}x |")
    print(f"\nThe objective alone, 8,192 tokens: {objective_alone():.2f} ms")


if __name__ == "__main__":
    main()
