"""One rank of a run: from a checked recipe to Megatron's `pretrain`.

Reads top to bottom as what happens: device, process group, arguments, model, the step, the loop. Starting the ranks is
`launcher`'s, the recipe's checks are `checks`', all numbers are `metrics`'.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from bft_megatron import arguments, checkpoint, communicators
from bft_megatron.announce import sentence
from bft_megatron.checkpoint.hf_copies import HFCopies
from bft_megatron.checkpoint.integrity import seal
from bft_megatron.checkpoint.recovery import newest_whole
from bft_megatron.checkpoint.retention import Retention
from bft_megatron.checkpoint.stopping import Stop
from bft_megatron.checkpoint.writer import after_each_save, mind_padding_between_buckets
from bft_megatron.checks import model_parallel_size
from bft_megatron.cpu import backend
from bft_megatron.data.blend import Blend
from bft_megatron.data.dataset import training_order, training_rows, validation_rows
from bft_megatron.errors import FieldError
from bft_megatron.hf import architectures, load
from bft_megatron.hf.architectures import ModelConfig
from bft_megatron.lora import adapters
from bft_megatron.meter import Meter
from bft_megatron.metrics import Reporter
from bft_megatron.output import RunFolder
from bft_megatron.peak import report_peak
from bft_megatron.recipe import Recipe
from bft_megatron.rows import RunRows
from bft_megatron.step import Step

GPU_FLAGS = ["--transformer-impl", "transformer_engine", "--distributed-backend", "nccl", "--num-workers", "1"]


def run(recipe: Recipe, config: ModelConfig, model_folder: Path, rows: RunRows, console: TextIO) -> None:
    """Train this rank's share to the end of the run, continuing from the newest checkpoint of its folder.

    Args:
        config, model_folder: the model's architecture, and the folder that holds its weights.
        rows: as prepared.
        console: where a person looks; the rest of what is printed goes wherever stdout does.

    Raises:
        FieldError: a flag under `megatron:` that Megatron does not have.

    Environment: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, as torchrun and launch/ set them.
    """
    folder, steps = RunFolder.of(recipe), rows.steps(recipe)
    on_cpu = runs_on_cpu(recipe)
    if on_cpu and recipe.objective.kernels == "triton":
        raise FieldError("objective.kernels", "triton runs on GPUs alone, and this run is on the CPU; use torch")
    join(recipe, on_cpu)
    checkpoint.without_helper_process()
    mind_padding_between_buckets()
    arguments.check_passed_through(recipe)
    start = newest_whole(folder, console)
    if start >= steps:  # killed between the last save and its mark
        return finish(recipe, None)
    if os.environ["RANK"] == "0":
        print(sentence(recipe, config, rows, dist.get_world_size(), start), file=console, flush=True)
    validation = validation_shape(recipe, rows.valid)
    flags = arguments.megatron_arguments(
        recipe,
        architectures.megatron_flags(config),
        device_flags(on_cpu),
        steps,
        validation,
    )
    names = [blend.names if blend and len(blend.parts) > 1 else () for blend in (rows.train, rows.valid)]
    meter = Meter(recipe.data.most_sources)
    step = Step(recipe.objective, config.vocab_size, meter)
    reporter = Reporter(meter, folder.metrics, console, step.objective.name, steps, *names)
    reporter.give_up(recipe.train.max_skipped, rows_of_step(recipe, rows))
    reporter.install(start)
    stop = Stop(reporter, steps, recipe.train.exit_after)
    stop.install()
    copies = HFCopies(folder, console) if recipe.train.save_hf and dist.get_rank() == 0 else None
    after_each_save(lambda iteration, seconds: saved(recipe, stop, copies, iteration, seconds))
    margs = parse(flags)
    model = model_config(recipe, config, model_folder, margs, on_cpu, fresh=start == 0)
    model.pre_wrap_hooks.append(communicators.warm_up)
    model.transformer.finalize_model_grads_func = step.finalize_grads
    with situation(recipe, reporter, step), stops(stop):
        pretrain(margs, model, step, datasets(recipe, rows, validation))
    if not on_cpu:
        report_peak(folder, console)
    finish(recipe, stop.reason)
    if stop.reason and dist.get_rank() == 0:
        print(f"{stop.reason}: saved, not finished; the same command goes on", file=console, flush=True)
    dist.destroy_process_group()
    if copies:
        copies.stop() if stop.reason else copies.complete()


def runs_on_cpu(recipe: Recipe) -> bool:
    """Whether this rank computes on the CPU: as the recipe says, or for want of a GPU."""
    return recipe.device == "cpu" or not backend.gpu_is_visible()


def device_flags(on_cpu: bool) -> list[str]:
    """What only the CPU or only GPUs need of Megatron's flags."""
    return backend.MEGATRON_FLAGS if on_cpu else GPU_FLAGS


def join(recipe: Recipe, on_cpu: bool) -> None:
    """Form the group of all ranks, unless there is one. Before Megatron does: checkpoints are looked at first.

    Ranks that wait for a lost one give up after Megatron's own `distributed-timeout-minutes`, 10 by default.
    """
    if on_cpu:
        backend.install()
    if dist.is_initialized():
        return
    timeout = timedelta(minutes=arguments.passed_through(recipe).get("distributed-timeout-minutes", 10))
    if on_cpu:
        dist.init_process_group("gloo", timeout=timeout)
    else:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timeout, device_id=device)


def finish(recipe: Recipe, stopped: str | None) -> None:
    """Leave the mark of a run that is done, or why it is not, when all ranks have come here. Collective: a barrier."""
    folder = RunFolder.of(recipe)
    dist.barrier()
    if dist.get_rank() != 0:
        return
    if stopped:
        folder.mark_unfinished(stopped)
    else:
        folder.mark_done()
        retention(recipe).apply(folder, wait=True)  # what was left undeleted, with the last validation known


def saved(recipe: Recipe, stop: Stop, copies: HFCopies | None, iteration: int, seconds: float) -> None:
    """After a save, on every rank: how long it took; on rank 0 the older ones are deleted that need not be kept."""
    stop.saved(iteration, seconds)
    if dist.get_rank() == 0 and not stop.reporter.skipped_in_a_row:  # else the last good one may be an older one
        folder = RunFolder.of(recipe)
        seal(folder.checkpoint(iteration))
        retention(recipe).apply(folder)
        if copies:
            copies.follow()


def retention(recipe: Recipe) -> Retention:
    """Which checkpoints the recipe keeps."""
    metric = recipe.train.best_metric or ("lm_loss" if recipe.objective.name == "sft" else "mean_p")
    return Retention(recipe.train.keep_last, recipe.train.keep_best, metric)


@contextlib.contextmanager
def stops(stop: Stop) -> Iterator[None]:
    """Megatron leaves its loop by `sys.exit`, with status 0 also where it should not: only ours may end well."""
    try:
        yield
    except SystemExit as e:
        if not stop.reason or e.code:
            raise RuntimeError(f"Megatron ended the run with status {e.code}; the log says why") from None


@contextlib.contextmanager
def situation(recipe: Recipe, reporter: Reporter, step: Step) -> Iterator[None]:
    """Notes for the last line of a run that fails: where it was, with which rows, and what it will go on from."""
    try:
        yield
    except Exception as e:
        e.add_note(f"after step {reporter.iteration}")
        if step.rows:
            e.add_note(f"rows of its micro-batch: {', '.join(map(str, step.rows))} of {recipe.data.train}")
        again = RunFolder.of(recipe).saved_iteration()
        e.add_note(f"next start: {f'from the checkpoint of step {again}' if again else 'from the beginning'}")
        raise


def rows_of_step(recipe: Recipe, rows: RunRows) -> Callable[[int], list[int]]:
    """step -> the rows of its global batch, by their numbers in the prepared data."""
    order = training_order(rows.train, seed=recipe.train.seed, limit=rows.rows(recipe))
    batch = recipe.train.global_batch_size

    def of(step: int) -> list[int]:
        found = (order.row(place) for place in range((step - 1) * batch, step * batch))
        return [row for row in found if row is not None]

    return of


def parse(flags: list[str]) -> Any:
    """Megatron's parsed and validated arguments, which also become its global ones. It reads `sys.argv` and nothing
    else.
    """
    from megatron.training.arguments import parse_and_validate_args

    before, sys.argv = sys.argv, ["bft-megatron", *flags]
    try:
        return parse_and_validate_args()
    finally:
        sys.argv = before


def model_config(
    recipe: Recipe, config: ModelConfig, model_folder: Path, margs: Any, on_cpu: bool, *, fresh: bool
) -> Any:
    """Megatron's model configuration, with our layers on the CPU, the weights and the adapters.

    Args:
        fresh: no checkpoint brings the weights.
    """
    from megatron.training.argument_utils import gpt_config_from_args

    model = gpt_config_from_args(margs)
    architectures.configure(model, config)
    if on_cpu:
        from bft_megatron.cpu.layers import layer_spec

        model.transformer_layer_spec = layer_spec
    if fresh or recipe.lora is not None:  # checkpoints of a LoRA run hold its adapters alone
        source = model_folder if recipe.init == "pretrained" else None
        model.pre_wrap_hooks.append(load.weights_hook(source, config, seed=recipe.train.seed))
    if recipe.lora is not None:
        adapters.install(model, recipe, config, on_cpu=on_cpu)
    return model


def validation_shape(recipe: Recipe, rows: Blend | None) -> tuple[int, int]:
    """Rows of a validation iteration, and iterations of a whole pass that reads every row once, whatever its source's
    weight: as few filler rows as the layout allows.
    """
    if rows is None:
        return 0, 0
    count, data_parallel = sum(rows.sizes), int(os.environ["WORLD_SIZE"]) // model_parallel_size(recipe)
    unit = recipe.train.micro_batch_size * data_parallel
    if recipe.parallel.virtual_pipeline > 1:
        unit *= recipe.parallel.pipeline  # the interleaved schedule wants whole rounds
    size = min(recipe.train.global_batch_size, -(-count // unit) * unit)
    return size, -(-count // size)


def datasets(recipe: Recipe, rows: RunRows, validation: tuple[int, int]) -> Callable[..., tuple[Any, Any, None]]:
    """Megatron's data set provider. Every rank, on every pipeline stage, reads its rows itself, without broadcast."""

    def provide(num_samples: Any, vp_stage: int | None = None) -> tuple[Any, Any, None]:
        train = training_rows(rows.train, seed=recipe.train.seed, limit=rows.rows(recipe))
        valid = validation_rows(rows.valid, batch=validation[0]) if validation[0] else None
        return train, valid, None

    provide.is_distributed = True
    return provide


def pretrain(margs: Any, model: Any, step: Step, provider: Callable[..., Any]) -> None:
    """Megatron's own loop."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        container = pretrain_cfg_container_from_args(margs, model)
        pretrain(container, provider, ModelType.encoder_or_decoder, step.forward)
