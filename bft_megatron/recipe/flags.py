"""Megatron's flags: those that recipe fields set, and the checks of those under `megatron:`.

`MADE` is the table from field to flag. `training.arguments` builds a run's arguments from it, and a recipe must not
set a flag that a field owns under `megatron:`. `flag_groups` sorts all other flags. Imports no Megatron.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bft_megatron.recipe.flag_groups import MAY_CHANGE, MAY_NOT_CHANGE, NOT_MEGATRONS, REFUSED, REFUSED_VALUES
from bft_megatron.recipe.schema import Recipe


@dataclass(frozen=True)
class FlagInputs:
    """The inputs from which the flags of a run are computed."""

    recipe: Recipe
    iterations: int
    """Steps of the whole run."""
    validation_rows: int
    """Rows of a validation iteration; 0 without a validation set."""
    validation_iterations: int
    """Iterations of a whole pass over the validation set; 0 without one."""
    checkpoints: Path
    """Folder of the checkpoints."""
    tensorboard: Path
    """Folder of the TensorBoard logs."""


def _nothing(_: FlagInputs) -> None:
    """Leave the flag out, because another flag carries its field."""


@dataclass(frozen=True)
class Made:
    """A flag that a run sets: the value of a recipe field, a fixed value with a reason, or a default with neither."""

    flag: str
    value: Callable[[FlagInputs], Any]
    """Computes the value: False or None omits the flag, True sets a switch, a list gives several values."""
    field: str = ""
    """The recipe's field that sets it."""
    why: str = ""
    """Why it is fixed."""


def _train(flag: str, name: str) -> Made:
    return Made(flag, lambda inputs: getattr(inputs.recipe.train, name), f"train.{name}")


MADE = (
    # The layout.
    Made("tensor-model-parallel-size", lambda inputs: inputs.recipe.parallel.tensor, "parallel.tensor"),
    Made("pipeline-model-parallel-size", lambda inputs: inputs.recipe.parallel.pipeline, "parallel.pipeline"),
    Made(
        "num-virtual-stages-per-pipeline-rank",
        lambda inputs: inputs.recipe.parallel.virtual_pipeline if inputs.recipe.parallel.virtual_pipeline > 1 else None,
        "parallel.virtual_pipeline",
    ),
    Made("num-layers-per-virtual-pipeline-stage", _nothing, "parallel.virtual_pipeline"),
    Made("context-parallel-size", lambda inputs: inputs.recipe.parallel.context, "parallel.context"),
    Made("expert-model-parallel-size", lambda inputs: inputs.recipe.parallel.expert, "parallel.expert"),
    Made(  # Megatron's own default is the tensor-parallel size
        "expert-tensor-parallel-size", lambda inputs: inputs.recipe.parallel.expert_tensor, "parallel.expert_tensor"
    ),
    Made("moe-token-dispatcher-type", lambda _: "alltoall"),
    # The routers' own losses.
    Made(
        "moe-router-load-balancing-type",
        lambda inputs: "seq_aux_loss" if inputs.recipe.moe.balance else "none",
        "moe.balance",
    ),
    Made("moe-aux-loss-coeff", lambda inputs: inputs.recipe.moe.balance or None, "moe.balance"),
    Made("moe-z-loss-coeff", lambda inputs: inputs.recipe.moe.z_loss or None, "moe.z_loss"),
    Made("sequence-parallel", lambda inputs: inputs.recipe.parallel.sequence_parallel, "parallel.sequence"),
    # The batch and the schedule.
    _train("micro-batch-size", "micro_batch_size"),
    _train("global-batch-size", "global_batch_size"),
    Made("seq-length", lambda inputs: inputs.recipe.data.seq_length, "data.seq_length"),
    Made("train-iters", lambda inputs: inputs.iterations, "train.iterations"),
    Made("train-samples", _nothing, "train.iterations"),
    _train("lr", "lr"),
    _train("min-lr", "min_lr"),
    Made("lr-decay-style", lambda _: "cosine"),
    _train("lr-warmup-iters", "warmup_iterations"),
    # The optimizer.
    Made("optimizer", lambda _: "adam", why="the optimizer is AdamW"),
    _train("weight-decay", "weight_decay"),
    Made("start-weight-decay", _nothing, "train.weight_decay"),
    Made("end-weight-decay", _nothing, "train.weight_decay"),
    Made("weight-decay-incr-style", _nothing, "train.weight_decay"),
    _train("adam-beta1", "adam_beta1"),
    _train("adam-beta2", "adam_beta2"),
    _train("adam-eps", "adam_eps"),
    _train("clip-grad", "clip_grad"),
    _train("seed", "seed"),
    Made("bf16", lambda inputs: inputs.recipe.train.precision == "bf16", "train.precision"),
    Made("fp16", _nothing, "train.precision"),
    Made(
        "use-distributed-optimizer",
        lambda _: True,
        why="the checkpoints that resume on another layout are the distributed optimizer's",
    ),
    Made("calculate-per-token-loss", lambda _: True, why="the exact divisor depends on it"),
    Made(
        "hidden-dropout", lambda _: 0.0, why="each rank would draw its own mask, and a run would depend on its layout"
    ),
    Made(
        "attention-dropout",
        lambda _: 0.0,
        why="each rank would draw its own mask, and a run would depend on its layout",
    ),
    # A constant loss scaler checks the gradient for inf and NaN, so that all ranks skip a step whose gradient is not
    # finite. Megatron's default reruns the step and exits, and would do so again at every restart.
    Made("loss-scale", lambda _: 1.0, why="the skipping of steps whose gradient is not finite depends on it"),
    Made(
        "no-check-for-nan-in-loss-and-grad",
        lambda _: True,
        why="such steps are skipped and counted; the check would end every restart again",
    ),
    Made("rerun-mode", lambda _: "disabled", why="a rerun would count a step's reports twice"),
    Made(  # the fused kernel belongs to apex
        "no-gradient-accumulation-fusion",
        lambda _: importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None,
    ),
    Made(
        "no-create-attention-mask-in-dataloader",
        lambda _: True,
        why="the attention masks are the rows' own sample boundaries",
    ),
    # Checkpoints, validation, the end of the run.
    Made("save", lambda inputs: inputs.checkpoints, "output"),
    Made("load", lambda inputs: inputs.checkpoints, "output"),
    Made("save-interval", lambda inputs: inputs.recipe.train.save_every or inputs.iterations, "train.save_every"),
    Made("save-retain-interval", _nothing, "train.keep_last"),
    Made("dist-ckpt-optim-fully-reshardable", lambda _: True),  # lets a run resume on another layout
    Made("ckpt-fully-parallel-load", lambda _: True),
    Made(
        "eval-interval", lambda inputs: inputs.recipe.train.validate_every or inputs.iterations, "train.validate_every"
    ),
    Made("eval-iters", lambda inputs: inputs.validation_iterations, "data.valid"),
    Made("eval-global-batch-size", lambda inputs: inputs.validation_rows or None, "data.valid"),
    Made("log-interval", lambda _: 1),
    Made("tensorboard-dir", lambda inputs: inputs.tensorboard, "output"),
    Made("exit-duration-in-mins", _nothing, "train.exit_after"),
    Made(  # `checkpoint.stopping` handles the signals instead
        "exit-signal-handler", lambda _: True, why="SIGUSR1, SIGTERM, SIGINT and SIGHUP are all answered"
    ),
)
"""Every flag that a run sets, except those for the model's architecture and for the device."""

_SPELLINGS = {"persistent-save-interval": "save-interval", "h": "help"}
_OPPOSITES = ("no-", "disable-")


def canonical(name: str) -> str:
    """Return a flag's canonical name: no leading dashes, dashes for underscores, `no-` where `disable-` means the same.

    For a name that Megatron does not have, only the dashes are normalised.
    """
    flag = name.lstrip("-").replace("_", "-")
    twin = flag.replace("disable-", "no-", 1)
    if flag.startswith("disable-") and passes(twin) and not passes(flag):
        return twin
    return _SPELLINGS.get(flag, flag)


def canonical_field(field: str) -> str:
    """Return a field's name; for a flag under `megatron`, with the flag's canonical name."""
    group, dot, flag = field.partition(".")
    return f"megatron.{canonical(flag)}" if group == "megatron" and dot else field


def refusal(flag: str, value: Any = True) -> str | None:
    """Return why a recipe must not set a flag under `megatron:`; None if it may.

    The opposite of a refused flag, with `no-` or `disable-` added or removed, is refused too.

    Args:
        flag: the flag's canonical name.
        value: the value that the recipe gives.
    """
    if reason := REFUSED_VALUES.get(flag, {}).get(value) if isinstance(value, str) else None:
        return f"cannot be used here: {reason}"
    if passes(flag):
        return None
    return next((said for name in _with_opposites(flag) if (said := _refusal(name))), None)


def passes(flag: str) -> bool:
    """Return whether a flag is passed on to Megatron."""
    return _find(flag, MAY_CHANGE) is not None or _find(flag, MAY_NOT_CHANGE) is not None


def may_change(flag: str) -> bool:
    """Return whether a flag may change when a run resumes."""
    return _find(flag, MAY_CHANGE) is not None


def is_left_out(flag: str, value: Any) -> bool:
    """Return whether this value is the same as omitting the flag: None, or False unless `MADE` sets the flag."""
    return value is None or (value is False and all(made.flag != flag for made in MADE))


def _refusal(flag: str) -> str | None:
    for made in MADE:
        if made.flag == flag and made.field:
            return f"is set by the recipe's own field {made.field}"
        if made.flag == flag and made.why:
            return f"cannot be used here: {made.why}"
    reason = _find(flag, REFUSED) or NOT_MEGATRONS.get(flag)
    return f"cannot be used here: {reason}" if reason else None


def _with_opposites(flag: str) -> list[str]:
    bare = next((flag.removeprefix(start) for start in _OPPOSITES if flag.startswith(start)), flag)
    return [flag, bare, *(f"{start}{bare}" for start in _OPPOSITES)]


def _find(flag: str, groups: dict[str, str]) -> str | None:
    """Return the reason or subject of the group whose patterns the flag matches; None if there is none."""
    return next((name for name, flags in groups.items() if any(fnmatchcase(flag, p) for p in flags.split())), None)
