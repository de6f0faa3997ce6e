"""A recipe as Megatron's argument list, and what of Megatron's own flags a recipe may pass through.

Megatron 0.19.2 reads nearly everything from its global arguments, whatever configuration object it is given; so a
recipe becomes a command line and goes through Megatron's own parser and validation.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
from typing import Any

from bft_megatron.errors import FieldError
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.folder import RunFolder

REFUSED = {
    "sft": "it makes validation a mean of means",
    "full-validation": "it crashes in Megatron 0.19.2; the whole validation set is read anyway",
    "rampup-batch-size": "Megatron 0.19.2 accepts and ignores it; use step-batch-size-schedule",
    "ddp-average-in-collective": "it divides the gradient before the exact divisor does",
    "spec": "the layer spec is chosen by the device",
    "dataloader-type": "the data order is exact only with the default",
    "rerun-mode": "a rerun would count a step's reports twice",
    "calculate-per-token-loss": "the exact divisor depends on it",
    "use-cpu-initialization": "it is set where it is right",
    "freeze-all-layers": "it disables the distributed optimizer",
    "loss-scale": "the skipping of steps whose gradient is not finite depends on it",
    "check-for-nan-in-loss-and-grad": "such steps are skipped and counted; the check would end every restart again",
    "async-save": "its helper processes die of the signal that asks for a save, and the run would wait for them",
    "exit-signal": "SIGUSR1, SIGTERM and SIGINT are all answered",
    "exit-interval": "status 0 would say that the run is done",
    "label-smoothing": "exp(-loss) would no longer be the probability of the label",
}

OWNED = {
    "tensor-model-parallel-size": "parallel.tensor",
    "pipeline-model-parallel-size": "parallel.pipeline",
    "num-virtual-stages-per-pipeline-rank": "parallel.virtual_pipeline",
    "num-layers-per-virtual-pipeline-stage": "parallel.virtual_pipeline",
    "context-parallel-size": "parallel.context",
    "sequence-parallel": "parallel.sequence",
    "micro-batch-size": "train.micro_batch_size",
    "global-batch-size": "train.global_batch_size",
    "train-iters": "train.iterations",
    "train-samples": "train.iterations",
    "seq-length": "data.seq_length",
    "lr": "train.lr",
    "min-lr": "train.min_lr",
    "lr-warmup-iters": "train.warmup_iterations",
    "weight-decay": "train.weight_decay",
    "clip-grad": "train.clip_grad",
    "seed": "train.seed",
    "bf16": "train.precision",
    "save": "output",
    "load": "output",
    "save-interval": "train.save_every",
    "eval-interval": "train.validate_every",
    "tensorboard-dir": "output",
    "exit-duration-in-mins": "train.exit_after",
    "save-retain-interval": "train.keep_last",
}


def megatron_arguments(
    recipe: Recipe, model_flags: list[str], device_flags: list[str], iterations: int, validation: tuple[int, int]
) -> list[str]:
    """The argument list of a run.

    Args:
        model_flags: the architecture (`hf.architectures.megatron_flags`).
        device_flags: what only the CPU or only GPUs need.
        iterations: steps of the whole run.
        validation: (rows a validation iteration, iterations of a whole pass); (0, 0) without a validation set.

    Raises:
        FieldError: a flag under `megatron:` that is refused or has a field of its own.
    """
    train, parallel, run = recipe.train, recipe.parallel, RunFolder.of(recipe)
    rows, passes = validation
    values: dict[str, Any] = {
        "tensor-model-parallel-size": parallel.tensor,
        "pipeline-model-parallel-size": parallel.pipeline,
        "context-parallel-size": parallel.context,
        "micro-batch-size": train.micro_batch_size,
        "global-batch-size": train.global_batch_size,
        "train-iters": iterations,
        "seq-length": recipe.data.seq_length,
        "lr": train.lr,
        "min-lr": train.min_lr,
        "lr-decay-style": "cosine",
        "lr-warmup-iters": train.warmup_iterations,
        "optimizer": "adam",
        "weight-decay": train.weight_decay,
        "adam-beta1": train.adam_beta1,
        "adam-beta2": train.adam_beta2,
        "adam-eps": train.adam_eps,
        "clip-grad": train.clip_grad,
        "seed": train.seed,
        "hidden-dropout": 0.0,
        "attention-dropout": 0.0,
        "use-distributed-optimizer": True,
        "calculate-per-token-loss": True,
        # A gradient that is not finite skips the step, on all ranks alike: the inf check of a constant loss scaler.
        # Megatron's default reruns the step, exits, and does so again at every restart.
        "loss-scale": 1.0,
        "no-check-for-nan-in-loss-and-grad": True,
        "rerun-mode": "disabled",
        "exit-signal-handler": True,  # `checkpoint.stopping` stands in for it
        "save": run.checkpoints,
        "load": run.checkpoints,
        "save-interval": train.save_every or iterations,
        "dist-ckpt-optim-fully-reshardable": True,  # resume on another layout
        "ckpt-fully-parallel-load": True,
        "log-interval": 1,
        "tensorboard-dir": run.tensorboard,
        "eval-interval": train.validate_every or iterations,
        "eval-iters": passes,
        "no-create-attention-mask-in-dataloader": True,
    }
    if passes:
        values["eval-global-batch-size"] = rows
    if parallel.virtual_pipeline > 1:
        values["num-virtual-stages-per-pipeline-rank"] = parallel.virtual_pipeline
    if recipe.parallel.sequence_parallel:
        values["sequence-parallel"] = True
    if train.precision == "bf16":
        values["bf16"] = True
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        values["no-gradient-accumulation-fusion"] = True  # the kernel is apex's
    values |= passed_through(recipe)
    return _argument_list(values) + model_flags + device_flags


def passed_through(recipe: Recipe) -> dict[str, Any]:
    """The recipe's `megatron:` flags, dashes for underscores; false leaves out a flag that we would set.

    Raises:
        FieldError: a flag that would break the objective, or that has a field of its own in the recipe.
    """
    flags = {}
    for name, value in recipe.megatron.items():
        flag, field = name.lstrip("-").replace("_", "-"), f"megatron.{name}"
        if flag in REFUSED or (flag == "attention-backend" and value == "local"):
            raise FieldError(field, f"cannot be used here: {REFUSED.get(flag, 'it knows no packed rows')}")
        if flag in OWNED:
            raise FieldError(field, f"is set by the recipe's own field {OWNED[flag]}")
        flags[flag] = value
    return flags


def check_passed_through(recipe: Recipe) -> None:
    """Raise FieldError for a name under `megatron:` that is none of Megatron's flags. Imports Megatron to see."""
    if not recipe.megatron:
        return
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    known = {option.lstrip("-") for option in parser._option_string_actions}
    for name in recipe.megatron:
        if (flag := name.lstrip("-").replace("_", "-")) not in known:
            close = difflib.get_close_matches(flag, known, n=1)
            raise FieldError(
                f"megatron.{name}", f"Megatron has no such flag{f'; did you mean {close[0]}?' if close else ''}"
            )


def _argument_list(values: dict[str, Any]) -> list[str]:
    arguments = []
    for flag, value in values.items():
        if value is False or value is None:
            continue
        arguments.append(f"--{flag}")
        if value is not True:
            arguments += [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]
    return arguments
