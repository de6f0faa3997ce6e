"""One rank of `bft-megatron check`: compare the recipe's layout with transformers on real rows.

Rank 0 runs transformers on the CPU in fp32 and writes the results to a file for the other ranks. Then all ranks run the
training step's own forward pass, and each compares its own part of every layer's output: no activation is gathered.
The tokens of a mixture are sent to the experts that transformers chooses, and those for which the layout's routers
choose others are counted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import default_collate

from bft_megatron.commands.replay import Replay
from bft_megatron.data.dataset import validation_rows
from bft_megatron.hf import reference
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.hf.reference import Row
from bft_megatron.hf.routing import differing
from bft_megatron.processes import ranks
from bft_megatron.processes.device import current_device
from bft_megatron.recipe.schema import Recipe
from bft_megatron.reporting.announce import describe_layout
from bft_megatron.reporting.totals import Meter
from bft_megatron.run.folder import RunFolder
from bft_megatron.run.prepared import RunRows
from bft_megatron.training import measuring
from bft_megatron.training.batch import Batch
from bft_megatron.training.model import build, forward
from bft_megatron.training.step import Step

ALLOWED = 1e-4
"""Allowed difference, relative to the largest element of a layer's output or to a loss: many times fp32's rounding."""

ROUNDING = 3
"""Allowed difference in bf16, in multiples of the error that rounding to bf16 gives transformers itself."""

REROUTED = {"fp32": 0.001, "bf16": 0.02}
"""Allowed share of a layer's tokens for which a router chooses other experts, since their scores are nearly equal; in
bf16 also `ROUNDING` times the share in transformers itself."""


def run(recipe: Recipe, config: ModelConfig, model_folder: Path, rows: RunRows, console: TextIO) -> bool:
    """Compare the layout with transformers and print the result on the last rank.

    Confidence windows are those of one process (`objective.cp_windows: exact`), as transformers has no others.

    Returns:
        Whether everything agrees, the same on every rank.

    Raises:
        UserError, FieldError: as for `build`.
    """
    recipe = replace(recipe, objective=replace(recipe.objective, cp_windows="exact"))
    # A fused router does not ask for its tokens' experts.
    recipe = replace(recipe, megatron={k: v for k, v in recipe.megatron.items() if k != "moe-router-fusion"})
    file = RunFolder.of(recipe).root / "check.safetensors"
    meter = Meter(recipe.data.most_sources)
    step = Step(recipe.objective, config.vocab_size, measuring.into(meter))
    batches = _batches(recipe, rows)
    first = ranks.rank() == 0
    try:
        if first:  # before Megatron's model takes memory; the other ranks wait in `build`, where the group is formed
            _write_reference(file, batches, recipe, config, model_folder, step)
        chunks = build(recipe, config, model_folder)
        dist.barrier()
        comparison = LayerComparison(file, config, step, meter)
        comparison.install([chunk.eval() for chunk in unwrap_model(chunks)])
        forward(chunks, batches, comparison.forward, recipe)
        good = comparison.verdict(recipe, console)
    finally:
        if first:
            file.unlink(missing_ok=True)
    dist.destroy_process_group()
    return good


def _batches(recipe: Recipe, rows: RunRows) -> list[Row]:
    """Return the first rows as micro-batches, the same on every data-parallel rank: two, or as many as VP needs."""
    b, count = recipe.train.micro_batch_size, 2
    if recipe.parallel.virtual_pipeline > 1:
        count = max(count, recipe.parallel.pipeline)
    dataset = validation_rows(rows.train, batch=count * b)
    return [default_collate([dataset[i + k] for k in range(b)]) for i in range(0, count * b, b)]


def _write_reference(
    file: Path, batches: list[Row], recipe: Recipe, config: ModelConfig, model_folder: Path, step: Step
) -> None:
    rows = [{k: x[i] for k, x in batch.items()} for batch in batches for i in range(len(batch["row"]))]
    rows = [row for row in rows if row["row"] >= 0]
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = reference.load(model_folder, config, pretrained=recipe.init == "pretrained", seed=recipe.train.seed)
    experts = config.experts.count if config.experts else 0
    exact = reference.compute(model, rows, step.objective, experts)
    allowed = torch.full((config.layers + 3,), ALLOWED)
    rerouted = torch.full((len(_mixtures(config)),), REROUTED[recipe.train.precision])
    losses = torch.tensor([exact.lm_loss, exact.loss], dtype=torch.float64)
    margin = ALLOWED * losses.abs()
    if recipe.train.precision == "bf16":
        rounded = reference.compute(model.bfloat16(), rows, step.objective, experts, routed_as=exact)
        rerouted = (ROUNDING * exact.rerouted(rounded)).maximum(rerouted)
        allowed = (ROUNDING * exact.error(rounded)).clamp(min=2**-8)
        off = (losses - torch.tensor([rounded.lm_loss, rounded.loss], dtype=torch.float64)).abs()
        margin = torch.maximum(ROUNDING * off, 2**-6 * losses.abs())
    tensors = {f"{r}.{i}": x for r, row in enumerate(exact.outputs) for i, x in enumerate(row)}
    tensors |= {f"{r}.experts.{i}": x for r, row in enumerate(exact.chosen) for i, x in enumerate(row)}
    tensors |= {"scale": exact.scale(), "allowed": allowed, "losses": losses, "margin": margin, "rerouted": rerouted}
    save_file(tensors, file, {"tokens": str(exact.tokens), "rows": str(len(rows))})
    torch.set_num_threads(threads)


def _mixtures(config: ModelConfig) -> list[int]:
    """Return the layers that have experts, numbered from 1."""
    return [i + 1 for i in range(config.layers) if config.has_experts(i)]


class LayerComparison:
    """A comparison of the layers on this rank with the reference, made while the model runs.

    Args:
        file: the reference's results, as `_write_reference` wrote them.
        config: the model's configuration.
        step: the training step whose forward pass is compared.
        meter: the meter of its totals.
    """

    def __init__(self, file: Path, config: ModelConfig, step: Step, meter: Meter) -> None:
        self.step, self.meter, self.stages = step, meter, reference.stages(config.layers)
        self.vocab_size, self.mixtures = config.vocab_size, _mixtures(config)
        self._file = safe_open(file, "pt")
        self.scale = self._file.get_tensor("scale")
        self.error = torch.zeros(len(self.stages), device=current_device())
        """[stages] fp32: the largest difference so far, relative to the reference's largest element."""
        self.routed = torch.zeros(2, len(self.mixtures), device=current_device())
        """[2, layers with experts]: tokens for which the router chooses others than transformers' does, and all."""

    def install(self, chunks: list[Any]) -> None:
        """Register a forward hook on every layer of this rank's chunks, and send tokens to transformers' experts."""
        for chunk in chunks:
            if chunk.pre_process:
                chunk.embedding.register_forward_hook(partial(self._hear, chunk, 0))
            for layer in chunk.decoder.layers:
                layer.register_forward_hook(partial(self._hear, chunk, layer.layer_number))
                if layer.layer_number in self.mixtures:
                    layer.mlp.router.router_replay = Replay(partial(self._choose, chunk, layer.layer_number))
            if chunk.post_process:
                chunk.decoder.final_layernorm.register_forward_hook(partial(self._hear, chunk, len(self.stages) - 2))

    def forward(self, rows: Iterator[Row], chunk: Any) -> Any:
        """Run the training step's forward pass, as Megatron's `forward_step_func`, and remember its batch."""
        item = next(rows)
        self._batch = Batch(**item)
        return self.step.forward(iter([item]), chunk)

    @torch.no_grad()
    def _hear(self, chunk: Any, stage: int, _: Any, __: Any, output: Any) -> None:
        """Compare a layer's output [s/cp (/tp under sequence parallelism), b, h]; after the last one the logits too."""
        hidden = output[0] if isinstance(output, tuple) else output
        self._compare(stage, hidden, self._own_positions(chunk))
        if stage == len(self.stages) - 2:
            weight = chunk.shared_embedding_or_output_weight() if chunk.share_embeddings_and_output_weights else None
            logits, _ = chunk.output_layer(hidden, weight=weight)  # [s/cp, b, v/tp]
            first = chunk.pg_collection.tp.rank() * logits.shape[-1]
            self._compare(stage + 1, logits[..., : max(self.vocab_size - first, 0)], self._positions(), first)

    def _choose(self, chunk: Any, layer: int, own: Tensor) -> Tensor:
        """Return transformers' experts of the tokens of a layer, [n * b, k], and count those for which `own` differ."""
        positions, m = self._own_positions(chunk), self.mixtures.index(layer)
        experts = own.view(*positions.shape, -1).clone()
        for k, row, at, real in self._rows(positions):
            expected = self._file.get_tensor(f"{row}.experts.{m}")[at].to(own.device)
            self.routed[:, m] += torch.stack([differing(experts[:, k], expected)[real].sum(), real.sum()])
            experts[:, k] = torch.where(real[:, None], expected, experts[:, k])
        return experts.view_as(own)

    def _positions(self) -> Tensor:
        """Return the positions in the flattened rows of this rank's tokens, [s/cp, b]."""
        return self._batch.geometry("exact").positions.view(len(self._batch.tokens), -1).t()

    def _own_positions(self, chunk: Any) -> Tensor:
        """Return those of the tokens between its layers, [s/cp (/tp under sequence parallelism), b]."""
        tp = chunk.pg_collection.tp
        return self._positions().chunk(tp.size())[tp.rank()] if chunk.config.sequence_parallel else self._positions()

    def _rows(self, positions: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Yield, for each row that is no filler: its place in the micro-batch, its number, its tokens' positions [n] in
        it, and which of them [n] are a sample's.
        """
        real = torch.repeat_interleave(self._batch.counted, self._batch.edges.diff())  # [b * s] bool
        for k, row in enumerate(self._batch.row.tolist()):
            if row >= 0:
                at = positions[:, k]
                yield k, row, at - k * self._batch.tokens.shape[1], real[at].to(current_device())

    def _compare(self, stage: int, x: Tensor, positions: Tensor, first: int = 0) -> None:
        """Compare x [n, b, w], at positions [n, b] of the flattened rows, with the reference's columns from `first`."""
        for k, row, at, real in self._rows(positions):
            expected = self._file.get_slice(f"{row}.{stage}")[:, first : first + x.shape[-1]][at]
            difference = (x[:, k].float() - expected.to(x.device))[real].abs()
            if difference.numel():
                worst = difference.max().nan_to_num(torch.inf) / self.scale[stage]
                self.error[stage] = torch.maximum(self.error[stage], worst)

    def verdict(self, recipe: Recipe, console: TextIO) -> bool:
        """Combine all ranks' findings and print them on the last rank, which has the losses. Collective over all ranks.

        Returns:
            Whether every layer's output, the logits, both losses and the number of tokens that are sent to other
            experts are within what is allowed.
        """
        from megatron.core import parallel_state

        dist.all_reduce(self.error, op=dist.ReduceOp.MAX)
        dist.all_reduce(self.routed)
        self.meter.reduce(parallel_state.get_data_parallel_group(with_context_parallel=True))
        report, box = self.meter.totals.report(), [False]
        if dist.get_rank() == dist.get_world_size() - 1:
            box = [self._say(report, recipe, Console(file=console, width=100))]
        dist.broadcast_object_list(box, src=dist.get_world_size() - 1)
        return box[0]

    def _say(self, report: dict[str, float], recipe: Recipe, console: Console) -> bool:
        allowed, error = self._file.get_tensor("allowed"), self.error.cpu()
        expected, margin = self._file.get_tensor("losses").tolist(), self._file.get_tensor("margin").tolist()
        found = [report["lm_loss"], report["loss"]]
        about = self._file.metadata()
        console.print(
            f"{about['rows']} rows, {about['tokens']} supervised tokens, {recipe.train.precision}, "
            f"{describe_layout(recipe, dist.get_world_size())}"
        )
        table = Table("", "transformers", "this layout", "difference", "allowed")
        names = ("lm loss", f"{recipe.objective.name} loss")
        off = [abs(x - y) for x, y in zip(expected, found, strict=True)]
        for name, *numbers in zip(names, expected, found, off, margin, strict=True):
            table.add_row(name, f"{numbers[0]:.7g}", f"{numbers[1]:.7g}", f"{numbers[2]:.1e}", f"{numbers[3]:.1e}")
        widest = int((error / allowed)[:-1].argmax())
        for name, stage in (("logits", len(error) - 1), (f"{self.stages[widest]}, of all the farthest off", widest)):
            size = float(self.scale[stage])
            largest = f"at most {size:.4g}"
            table.add_row(name, largest, "", f"{error[stage] * size:.1e}", f"{allowed[stage] * size:.1e}")
        rerouted = self._add_routing(table)
        console.print(table)
        apart = [i for i in range(len(error)) if not error[i] <= allowed[i]]
        if apart:
            fault = f"the first that differs from transformers is the {self.stages[apart[0]]}"
        elif not all(x <= y for x, y in zip(off, margin, strict=True)):
            fault = "every layer is as in transformers, the losses are not"
        elif rerouted:
            fault = f"the first whose router chooses other experts than transformers is layer {rerouted[0]}"
        else:
            console.print("[green]green[/]")
            return True
        console.print(f"[red]red[/]: {fault}")
        return False

    def _add_routing(self, table: Table) -> list[int]:
        """Add the layer that sends most tokens to other experts; return those that send more than is allowed."""
        if not self.mixtures:
            return []
        share, allowed = (self.routed[0] / self.routed[1]).cpu(), self._file.get_tensor("rerouted")
        most = int((share / allowed).argmax())
        name = f"layer {self.mixtures[most]}, tokens rerouted"
        table.add_row(name, "", "", f"{share[most]:.2%}", f"{allowed[most]:.2%}")
        return [layer for layer, here, limit in zip(self.mixtures, share, allowed, strict=True) if not here <= limit]
