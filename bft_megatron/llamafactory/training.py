"""The objective, the batch, the schedule, the optimizer, checkpoints and validations."""

from __future__ import annotations

import math
import os

from bft_megatron import defaults
from bft_megatron.llamafactory.conversion import Conversion
from bft_megatron.llamafactory.layout import deepspeed, model_parallel_size, on_megatron

# lr_scheduler_type -> Megatron's lr-decay-style
_STYLES = {
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_restarts": "cosine",
    "cosine_with_min_lr": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
_ADAMW = {
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_hf",
    "adamw_apex_fused",
    "adamw_torch_xla",
    "adamw_torch_npu_fused",
}
_SAVE_STEPS = 500  # LLaMA-Factory's default, which is transformers'


def carry_objective(to: Conversion) -> None:
    """`use_bft_loss` and `use_dft_loss`, the former of which wins, and what BFT takes from the environment."""
    config = to.config
    dft, bft = config.flag("use_dft_loss"), config.flag("use_bft_loss")
    name = "bft" if bft else "dft" if dft else "sft"
    theirs = f"use_{name}_loss" if name != "sft" else "cross entropy"
    if name != "sft" and on_megatron(config):
        theirs += " (which its Megatron backends ignore)"
    to.carry("objective", theirs, "objective.name", name)
    if bft:
        for variable, field, value in (
            ("BFT_GROUP_SIZE", "objective.group_size", defaults.group_size()),
            ("BFT_CONF_GAMMA", "objective.gamma", defaults.gamma()),
        ):
            set_there = os.environ.get(variable, "").strip()
            to.carry("", f"{variable} {value:g}", field, value if set_there else None, f"{field} {value:g}")
        to.carry(
            "",
            "mean over samples; gradients of accumulated batches added",
            "objective.reduce",
            None,
            "mean over samples",
        )
    elif dft:
        to.carry("", "mean over supervised tokens", "objective.reduce", None, "mean over supervised tokens")


def carry(to: Conversion) -> None:
    """Everything of a run's steps but the objective."""
    _carry_batch(to)
    steps = _carry_length(to)
    _carry_learning_rate(to, steps)
    _carry_optimizer(to)
    _carry_checkpoints(to, steps)
    _carry_validation(to, steps)


def _carry_batch(to: Conversion) -> None:
    config = to.config
    micro = config.integer("per_device_train_batch_size", 8)
    accumulation = config.integer("gradient_accumulation_steps", 1)
    copies = to.gpus // model_parallel_size(config)
    packing = to.fields["data.packing"]
    unit = "rows" if packing else "samples"
    what = f"{to.gpus} GPU{'s' * (to.gpus > 1)}" if copies == to.gpus else f"{to.gpus} GPUs / {to.gpus // copies}"
    batch = micro * accumulation * copies
    product = f"batch {micro} x accumulation {accumulation} x {what} = {batch} {unit}"
    to.carry("global batch", product, "train.global_batch_size", batch, f"train.global_batch_size {batch} {unit}")
    if not packing and micro > 1:
        to.carry_field("micro-batch", "per_device_train_batch_size", "train.micro_batch_size", micro)


def _carry_length(to: Conversion) -> int | None:
    """Returns the run's steps where the config says them."""
    config = to.config
    steps = config.integer("max_steps", -1, least=-1)
    epochs = config.number("num_train_epochs", 3.0)
    if steps > 0:
        to.carry("length", f"max_steps {steps}", "train.iterations", steps)
        return steps
    to.carry("length", f"num_train_epochs {epochs:g}", "train.epochs", float(epochs))
    return None


def _carry_learning_rate(to: Conversion, steps: int | None) -> None:
    config = to.config
    peak = float(config.number("learning_rate", 5e-5))
    to.carry("learning rate", f"learning_rate {peak:g}", "train.lr", peak)
    kind, options = config.text("lr_scheduler_type", "linear"), config.raw("lr_scheduler_kwargs") or {}
    style = _STYLES.get(kind)
    if not isinstance(options, dict) or options.keys() - {"min_lr", "min_lr_rate", "num_cycles"}:
        to.lose("lr_scheduler_kwargs", "of these only the smallest learning rate of a cosine can be carried over")
        options = {}
    if style is None or options.get("num_cycles", 1) not in (0.5, 1):
        to.lose("lr_scheduler_type", f"the recipe has a cosine; under `megatron`, lr-decay-style has {_others()}")
        style = "cosine"
    lowest = float(options.get("min_lr", options.get("min_lr_rate", 0.0) * peak))
    ours = "cosine, the default" if style == "cosine" else f"megatron.lr-decay-style {style}"
    to.carry(
        "schedule", f"lr_scheduler_type {kind}", "megatron.lr-decay-style", None if style == "cosine" else style, ours
    )
    if lowest:
        to.carry("", f"down to {lowest:g}", "train.min_lr", lowest)
    _carry_warmup(to, kind, steps)


def _others() -> str:
    return "linear, constant, inverse-square-root and WSD"


def _carry_warmup(to: Conversion, kind: str, steps: int | None) -> None:
    """A ratio stays one where the steps depend on the data: Megatron takes it of the steps that the run will have."""
    config = to.config
    length, ratio = config.number("warmup_steps", 0.0), config.number("warmup_ratio", 0.0)
    theirs = f"warmup_steps {length:g}" if length else f"warmup_ratio {ratio:g}"
    if 0 < length < 1:  # as of transformers 5 a share of the steps
        length, ratio = 0.0, length
    if not length and not ratio:
        return
    if kind == "constant":
        to.carry("warm-up", f"{theirs}, which a constant schedule ignores", "train.warmup_iterations", None, "none")
        return
    warmup = int(length) or (math.ceil(ratio * steps) if steps else None)
    if warmup is None:
        to.carry("warm-up", f"{theirs} of the steps", "megatron.lr-warmup-fraction", ratio)
    elif steps and warmup >= steps:
        name = "warmup_steps" if config.given("warmup_steps") else "warmup_ratio"
        to.lose(name, f"a warm-up of {warmup} steps would not end within max_steps: the recipe has none")
    else:
        to.carry("warm-up", f"{theirs}{f' = {warmup} steps' if ratio else ''}", "train.warmup_iterations", warmup)


def _carry_optimizer(to: Conversion) -> None:
    config = to.config
    for matter, theirs, ours, default in (
        ("weight decay", "weight_decay", "train.weight_decay", 0.0),
        ("Adam", "adam_beta1", "train.adam_beta1", 0.9),
        ("", "adam_beta2", "train.adam_beta2", 0.999),
        ("", "adam_epsilon", "train.adam_eps", 1e-8),
    ):
        to.carry_field(matter, theirs, ours, float(config.number(theirs, default)))
    optimizer = config.text("optim", "adamw_torch")
    if optimizer not in _ADAMW:
        to.lose("optim", "the optimizer is AdamW")
    clip = deepspeed(config).get("gradient_clipping", "auto")
    if isinstance(clip, int | float):
        to.carry("clipping", f"gradient_clipping {clip:g} of the DeepSpeed file", "train.clip_grad", float(clip))
    else:
        to.carry_field("clipping", "max_grad_norm", "train.clip_grad", float(config.number("max_grad_norm", 1.0)))
    to.carry_field("seed", "seed", "train.seed", config.integer("seed", 42, least=0))


def _carry_checkpoints(to: Conversion, steps: int | None) -> None:
    config = to.config
    every = _carry_interval(to, "save_strategy", "steps", "save_steps", _SAVE_STEPS, steps)
    if every:
        to.carry("checkpoints", f"save_steps {every}", "train.save_every", every)
    if config.given("save_total_limit"):
        to.carry_field("", "save_total_limit", "train.keep_last", config.integer("save_total_limit", 2))
    elif every:
        to.carry("", "all are kept", "train.keep_last", None, "train.keep_last 2, the default")


def _carry_validation(to: Conversion, steps: int | None) -> None:
    config = to.config
    strategy = "eval_strategy" if config.given("eval_strategy") else "evaluation_strategy"
    default = int(config.number("logging_steps", _SAVE_STEPS)) or 1
    every = _carry_interval(to, strategy, "no", "eval_steps", default, steps)
    if "data.valid" not in to.fields:
        return
    theirs = f"eval_steps {every}" if every else "at the end"
    to.carry(
        "validation", theirs, "train.validate_every", every, "" if every else "before the first step and at the end"
    )
    if not config.flag("load_best_model_at_end"):
        return
    saves = to.fields.get("train.save_every")
    if not every or not saves or saves % every:
        to.lose(
            "load_best_model_at_end",
            "the checkpoint that is kept must be validated: save_steps a multiple of eval_steps",
        )
        return
    to.carry("best checkpoint", "load_best_model_at_end", "train.keep_best", 1)
    if config.text("metric_for_best_model", "loss") in ("loss", "eval_loss"):
        to.carry("", "metric_for_best_model loss", "train.best_metric", "loss")
    else:
        to.lose("metric_for_best_model", "train.best_metric takes loss, lm_loss, mean_p or accuracy")


def _carry_interval(
    to: Conversion, strategy: str, usual: str, name: str, default: int, steps: int | None
) -> int | None:
    """Steps between two saves or validations; None for none but the last, or where they cannot be told."""
    config = to.config
    chosen = config.raw(strategy)
    chosen = {False: "no", None: usual}.get(chosen, chosen)  # YAML reads a bare `no` as false
    if chosen == "no":
        config.raw(name)
        return None
    if chosen != "steps":
        to.lose(
            strategy,
            f"an interval is given in steps: {'train.save_every' if usual == 'steps' else 'train.validate_every'}",
        )
        return None
    every = config.number(name, default)
    if 0 < every < 1 and steps is None:
        to.lose(name, "is a share of the steps, whose number depends on the data: give it in steps")
        return None
    return math.ceil(every * steps) if every < 1 and steps else config.integer(name, default)
