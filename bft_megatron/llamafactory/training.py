"""The batch size, the run's length, the learning rate and the optimizer."""

from __future__ import annotations

import math

from bft_megatron.llamafactory.conversion import Conversion
from bft_megatron.llamafactory.objective import summed
from bft_megatron.llamafactory.parallelism import deepspeed, model_parallel_size

# lr_scheduler_type -> Megatron's lr-decay-style
_STYLES = {
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_restarts": "cosine",
    "cosine_with_min_lr": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
_CYCLES = {"cosine": 0.5, "cosine_with_restarts": 1}  # default num_cycles: a single decay
_ADAMW = {
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_hf",
    "adamw_apex_fused",
    "adamw_torch_xla",
    "adamw_torch_npu_fused",
}


def carry(to: Conversion) -> None:
    """Convert batch size, length, learning rate and optimizer. Call it after `data.carry`."""
    _carry_batch(to)
    steps = _carry_length(to)
    _carry_learning_rate(to, steps)
    _carry_optimizer(to)


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
    """Convert the length; return the number of steps if the config gives it."""
    config = to.config
    steps = config.integer("max_steps", -1, least=-1)
    epochs = config.number("num_train_epochs", 3.0)
    if steps > 0:
        to.carry("length", f"max_steps {steps}", "train.iterations", steps)
        return steps
    theirs, ours = f"num_train_epochs {epochs:g}", f"train.epochs {epochs:g}"
    if to.samples is not None and (steps_there := _steps_there(to)):
        batch = to.fields["train.global_batch_size"]
        theirs += f" of {to.samples:,} samples = {_steps(steps_there)}"
        ours += f" = {_steps(math.ceil(round(epochs * to.samples) / batch))}"
    to.carry("length", theirs, "train.epochs", float(epochs), ours)
    return None


def _steps_there(to: Conversion) -> int | None:
    """Return LLaMA-Factory's steps for whole epochs, each ending with a smaller batch; None if packing hides it."""
    if to.samples is None or to.fields["data.packing"]:
        return None
    config = to.config
    copies = to.gpus // model_parallel_size(config)
    batches = math.ceil(to.samples / (config.integer("per_device_train_batch_size", 8) * copies))
    an_epoch = math.ceil(batches / config.integer("gradient_accumulation_steps", 1))
    return math.ceil(an_epoch * config.number("num_train_epochs", 3.0))


def _carry_learning_rate(to: Conversion, steps: int | None) -> None:
    config = to.config
    peak = float(config.number("learning_rate", 5e-5))
    to.carry("learning rate", f"learning_rate {peak:g}", "train.lr", peak)
    kind = config.text("lr_scheduler_type", "linear")
    options = _options(to, _CYCLES.get(kind))
    style = _STYLES.get(kind)
    if style is None:
        to.lose("lr_scheduler_type", "the recipe has a cosine; Megatron's others are values of megatron.lr-decay-style")
    if style in (None, "cosine"):
        to.show("schedule", f"lr_scheduler_type {kind}", "cosine, the default")
    else:
        to.carry("schedule", f"lr_scheduler_type {kind}", "megatron.lr-decay-style", style)
    if lowest := options.get("min_lr", options.get("min_lr_rate", 0.0) * peak):
        to.carry("schedule", f"down to {lowest:g}", "train.min_lr", float(lowest))
    _carry_warmup(to, kind, steps)


def _options(to: Conversion, cycles: float | None) -> dict[str, float]:
    """Return `lr_scheduler_kwargs` if all can be carried over: a lowest rate, and values that are the default."""
    options = to.config.raw("lr_scheduler_kwargs") or {}
    if isinstance(options, dict) and all(isinstance(value, int | float) for value in options.values()):
        others = options.keys() - {"min_lr", "min_lr_rate"}
        if not others or (others == {"num_cycles"} and options["num_cycles"] == cycles):
            return options
    to.lose("lr_scheduler_kwargs", "of these only a cosine's lowest learning rate can be carried over")
    return {}


def _carry_warmup(to: Conversion, kind: str, steps: int | None) -> None:
    """Convert the warm-up. A ratio stays one if the number of steps depends on the data: Megatron applies it itself."""
    config = to.config
    length, ratio = config.number("warmup_steps", 0.0), config.number("warmup_ratio", 0.0)
    theirs = f"warmup_steps {length:g}" if length else f"warmup_ratio {ratio:g}"
    if 0 < length < 1:  # since transformers 5, a share of the steps
        length, ratio = 0.0, length
    if ratio >= 1:
        raise config.wrong("warmup_ratio", f"must be below 1, the share of the steps, not {ratio:g}")
    if not length and not ratio:
        return
    if kind == "constant":
        to.show("warm-up", f"{theirs}, which a constant schedule ignores", "none")
        return
    warmup = int(length) or (math.ceil(ratio * steps) if steps else None)
    if warmup is None:
        there = _steps_there(to)
        share = f" = {_steps(math.ceil(ratio * there))}" if there else " of the steps"
        to.carry("warm-up", f"{theirs}{share}", "megatron.lr-warmup-fraction", ratio, f"{ratio:g} of the steps")
    elif steps and warmup >= steps:
        name = "warmup_steps" if config.given("warmup_steps") else "warmup_ratio"
        to.lose(name, f"a warm-up of {warmup} steps would not end within max_steps: the recipe has none")
    else:
        to.carry("warm-up", f"{theirs}{f' = {_steps(warmup)}' if ratio else ''}", "train.warmup_iterations", warmup)


def _carry_optimizer(to: Conversion) -> None:
    config = to.config
    for matter, theirs, ours, default in (
        ("weight decay", "weight_decay", "train.weight_decay", 0.0),
        ("Adam", "adam_beta1", "train.adam_beta1", 0.9),
        ("Adam", "adam_beta2", "train.adam_beta2", 0.999),
    ):
        to.carry_field(matter, theirs, ours, float(config.number(theirs, default)))
    if config.text("optim", "adamw_torch") not in _ADAMW:
        to.lose("optim", "the optimizer is AdamW")
    _carry_scaled(to, "Adam", "adam_epsilon", "train.adam_eps", config.number("adam_epsilon", 1e-8))
    clip = deepspeed(config).get("gradient_clipping", "auto")
    if isinstance(clip, int | float):
        _carry_scaled(to, "clipping", "gradient_clipping of the DeepSpeed file", "train.clip_grad", clip)
    else:
        _carry_scaled(to, "clipping", "max_grad_norm", "train.clip_grad", config.number("max_grad_norm", 1.0))
    to.carry_field("seed", "seed", "train.seed", config.integer("seed", 42, least=0))


def _carry_scaled(to: Conversion, matter: str, theirs: str, ours: str, value: float) -> None:
    """Convert a number that is compared with the gradient, of which LLaMA-Factory's may be a multiple.

    Adam moves a weight by m / (sqrt(v) + eps): where m and sqrt(v) are divided, eps is too.
    """
    if not (terms := summed(to)):
        to.carry_field(matter, theirs, ours, float(value))
        return
    listed = " x ".join(f"{number} {name}" for name, number in terms.items())
    what = f"{theirs} {value:g} of a gradient summed over {listed}"
    to.carry(matter, what, ours, value / math.prod(terms.values()))


def _steps(number: int) -> str:
    return f"{number:,} step{'s' * (number != 1)}"
