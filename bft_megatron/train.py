"""One rank of a run: from a checked recipe to Megatron's `pretrain`.

Reads top to bottom as what happens: device, process group, arguments, model, the step, the loop. Starting the ranks is
`launcher`'s, the recipe's checks are `checks`', all numbers are `metrics`'.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from bft_megatron import arguments, checkpoint
from bft_megatron.announce import sentence
from bft_megatron.checks import model_parallel_size
from bft_megatron.cpu import backend
from bft_megatron.data.dataset import training_rows, validation_rows
from bft_megatron.data.prepare import Prepared
from bft_megatron.hf import architectures, load
from bft_megatron.hf.architectures import ModelConfig
from bft_megatron.metrics import Meter, Reporter
from bft_megatron.output import RunFolder
from bft_megatron.recipe import Recipe
from bft_megatron.rows import RunRows
from bft_megatron.step import Step

GPU_FLAGS = ["--transformer-impl", "transformer_engine", "--distributed-backend", "nccl", "--num-workers", "1"]

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""After which ranks that wait for a lost one give up."""


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
    on_cpu = recipe.device == "cpu" or not backend.gpu_is_visible()
    if on_cpu:
        backend.install()
        if not dist.is_initialized():  # Megatron's own call would bind a CUDA device
            dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)
    checkpoint.without_helper_process()
    arguments.check_passed_through(recipe)
    if os.environ["RANK"] == "0":
        world = int(os.environ["WORLD_SIZE"])
        print(sentence(recipe, config, rows, world, folder.saved_iteration()), file=console, flush=True)
    validation = validation_shape(recipe, rows.valid)
    flags = arguments.megatron_arguments(
        recipe,
        architectures.megatron_flags(config),
        backend.MEGATRON_FLAGS if on_cpu else GPU_FLAGS,
        steps,
        validation,
    )
    margs = parse(flags)
    meter = Meter()
    step = Step(recipe.objective, config.vocab_size, meter)
    model = model_config(recipe, config, model_folder, step, margs, on_cpu)
    reporter = Reporter(meter, folder.metrics, console, step.objective.name, steps)
    reporter.install(folder.saved_iteration())
    pretrain(margs, model, step, datasets(recipe, rows, validation))
    dist.destroy_process_group()


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


def model_config(recipe: Recipe, config: ModelConfig, model_folder: Path, step: Step, margs: Any, on_cpu: bool) -> Any:
    """Megatron's model configuration, with our layers on the CPU, the weights, and the end of a step."""
    from megatron.training.argument_utils import gpt_config_from_args

    model = gpt_config_from_args(margs)
    architectures.configure(model, config)
    if on_cpu:
        from bft_megatron.cpu.layers import layer_spec

        model.transformer_layer_spec = layer_spec
    if not RunFolder.of(recipe).saved_iteration():  # else the checkpoint brings them
        source = model_folder if recipe.init == "pretrained" else None
        model.pre_wrap_hooks.append(load.weights_hook(source, config, seed=recipe.train.seed))
    model.transformer.finalize_model_grads_func = step.finalize_grads
    return model


def validation_shape(recipe: Recipe, valid: Prepared | None) -> tuple[int, int]:
    """Rows of a validation iteration and iterations of a whole pass: as few filler rows as the layout allows."""
    if valid is None:
        return 0, 0
    data_parallel = int(os.environ["WORLD_SIZE"]) // model_parallel_size(recipe)
    unit = recipe.train.micro_batch_size * data_parallel
    if recipe.parallel.virtual_pipeline > 1:
        unit *= recipe.parallel.pipeline  # the interleaved schedule wants whole rounds
    rows = min(recipe.train.global_batch_size, -(-valid.rows // unit) * unit)
    return rows, -(-valid.rows // rows)


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
