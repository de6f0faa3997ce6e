"""Parallel sizes, sharding, recomputation and precision, for LLaMA-Factory's Megatron, DeepSpeed and FSDP backends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bft_megatron.llamafactory.config import Config
from bft_megatron.llamafactory.conversion import Conversion
from bft_megatron.textfiles import read_object

_SIZES = {
    "tensor_model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
    "context_parallel_size": "parallel.context",
    "expert_model_parallel_size": "parallel.expert",
}

# Fields of both backends, each one of Megatron's own flags.
_FLAGS = (
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
    "overlap_param_gather",
    "overlap_grad_reduce",
    "optimizer_cpu_offload",
    "optimizer_offload_fraction",
)
_RECOMPUTE = ("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules")
_EVERY_LAYER = {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}
_MIXED_PRECISION = {"bf16_mixed": "bf16", "bf16-mixed": "bf16", "32": "fp32", "fp32": "fp32"}


def model_parallel_size(config: Config) -> int:
    """Return the number of GPUs that hold the model once: tensor x pipeline x context."""
    return tensor_size(config) * config.integer("pipeline_model_parallel_size", 1) * context_size(config)


def tensor_size(config: Config) -> int:
    """Return the tensor-parallel size, from a Megatron backend's field or the DeepSpeed file."""
    return max(config.integer("tensor_model_parallel_size", 1), _autotp(config))


def context_size(config: Config) -> int:
    """Return the context-parallel size, from a Megatron backend's field or HyperParallel's."""
    return max(config.integer("context_parallel_size", 1), config.integer("hyper_parallel_cp_size", 1))


def on_megatron(config: Config) -> bool:
    """Return whether the config is for one of LLaMA-Factory's Megatron backends, by its fields or the environment."""
    switched = _switched(config, "use_mca") or _switched(config, "use_megatron_bridge")
    return switched or any(config.given(name) for name in (*_SIZES, *_RECOMPUTE))


def _switched(config: Config, name: str) -> bool:
    return config.flag(name) or os.environ.get(name.upper(), "").lower() in ("1", "true", "y")


def deepspeed(config: Config) -> dict[str, Any]:
    """Return the content of the DeepSpeed file; {} if the config names none, or if it isn't here.

    It is searched in the current folder, the config's folder and the parents of that.

    Raises:
        UserError: the file is not a JSON object.
    """
    value = config.raw("deepspeed")
    if value is None or isinstance(value, dict):
        return value or {}
    path = _find(config.text("deepspeed"), config.path)
    if path is None:
        return {}
    return read_object(path)


def carry(to: Conversion) -> None:
    """Convert parallel sizes, sharding, recomputation and precision."""
    _carry_sizes(to)
    _carry_sharding(to)
    _carry_flags(to)
    _carry_recomputation(to)
    _carry_precision(to)


def _carry_sizes(to: Conversion) -> None:
    config = to.config
    for theirs, ours in _SIZES.items():
        if (size := config.integer(theirs, 1)) > 1:
            to.carry_field("layout", theirs, ours, size)
    if (size := _autotp(config)) > 1:
        to.carry("layout", f"autotp_size {size} of the DeepSpeed file", "parallel.tensor", size)
    if (size := config.integer("hyper_parallel_cp_size", 1)) > 1:
        to.carry("layout", f"hyper_parallel_cp_size {size}", "parallel.context", size)
    _carry_expert_tensor(to)
    tensor = to.fields.get("parallel.tensor", 1)
    sequence = config.flag("sequence_parallel")
    if tensor > 1 and config.given("sequence_parallel"):
        to.carry("layout", f"sequence_parallel {str(sequence).lower()}", "parallel.sequence", sequence)
    elif sequence:
        to.lose("sequence_parallel", "it shards over tensor ranks, of which there is one")


def _carry_expert_tensor(to: Conversion) -> None:
    """Convert the tensor-parallel size of experts, by default that of the other layers in a mixture."""
    config = to.config
    name, ours = "expert_tensor_parallel_size", "parallel.expert_tensor"
    if config.given(name):
        to.carry_field("layout", name, ours, config.integer(name, 1))
    elif to.fields.get("parallel.expert", 1) > 1 and (size := tensor_size(config)) > 1:
        to.carry("layout", f"{name}, by default the tensor-parallel size", ours, size)


def _carry_sharding(to: Conversion) -> None:
    config = to.config
    settings = deepspeed(config)
    if config.given("deepspeed") and not settings:
        to.lose("deepspeed", "is not here: its ZeRO stage, offloading and clipping are not known")
    zero = _group(settings, "zero_optimization")
    theirs = f"DeepSpeed ZeRO {zero['stage']}" if "stage" in zero else "FSDP" if config.raw("fsdp") else ""
    if theirs:
        ours = "the optimizer's state, over all GPUs"
        if zero.get("stage") not in (0, 1):
            ours += "; parallel.tensor and pipeline shard the weights: see `bft-megatron plan`"
        to.show("sharding", theirs, ours)
    if _group(zero, "offload_optimizer").get("device") in ("cpu", "nvme"):
        for flag in ("optimizer-cpu-offload", "use-precision-aware-optimizer"):
            to.carry("offloading", "offload_optimizer of the DeepSpeed file", f"megatron.{flag}", True)
    if _group(zero, "offload_param").get("device") in ("cpu", "nvme"):
        to.lose("deepspeed", "offload_param: weights stay on the GPUs here")
    for name in ("optimizer", "scheduler"):
        if name in settings:
            to.lose("deepspeed", f"{name}: the recipe's own holds, AdamW and the schedule of the config")


def _carry_flags(to: Conversion) -> None:
    config = to.config
    for name in _FLAGS:
        if value := config.raw(name):
            to.carry("Megatron", f"{name} {value}", f"megatron.{name.replace('_', '-')}", value)
            if name == "optimizer_cpu_offload":  # which Megatron takes only together
                to.carry("offloading", f"{name} {value}", "megatron.use-precision-aware-optimizer", True)


def _carry_recomputation(to: Conversion) -> None:
    """Convert recomputation: LLaMA-Factory's trainer has it on by default, its Megatron backends have own fields."""
    config = to.config
    if on_megatron(config):
        flags = {name.replace("_", "-"): config.raw(name) for name in _RECOMPUTE if config.raw(name)}
        if flags.get("recompute-granularity") == "full":
            flags = _EVERY_LAYER | flags
        theirs = ", ".join(f"{name} {config.raw(name)}" for name in _RECOMPUTE if config.given(name))
    else:
        flags = {} if config.flag("disable_gradient_checkpointing") else _EVERY_LAYER
        theirs = "gradient checkpointing of every layer, its default"
    for flag, value in flags.items():
        if isinstance(value, str) and flag == "recompute-modules":
            value = value.split(",")
        to.carry("recomputation", theirs, f"megatron.{flag}", value)
        theirs = ""


def _carry_precision(to: Conversion) -> None:
    config = to.config
    bf16, fp16, pure = config.flag("bf16"), config.flag("fp16"), config.flag("pure_bf16")
    if config.given("mixed_precision") or _switched(config, "use_megatron_bridge"):
        name = str(config.raw("mixed_precision") or "bf16_mixed")
        precision, theirs = _MIXED_PRECISION.get(name, "bf16"), f"mixed_precision {name}"
        if name not in _MIXED_PRECISION:
            to.lose("mixed_precision", "there are bf16 and fp32 here")
    else:
        precision = "bf16" if bf16 or fp16 or pure else "fp32"
        theirs = "bf16" if bf16 or pure else "fp16" if fp16 else "neither bf16 nor fp16"
    to.carry("precision", theirs, "train.precision", precision)
    if fp16:
        to.lose("fp16", "the recipe has bf16, whose range needs no loss scale")
    if pure:
        to.lose("pure_bf16", "master weights and Adam's moments are fp32 here")


def _autotp(config: Config) -> int:
    size = _group(deepspeed(config), "tensor_parallel").get("autotp_size", 1)
    return size if isinstance(size, int) and size > 0 else 1


def _group(settings: dict[str, Any], name: str) -> dict[str, Any]:
    return value if isinstance(value := settings.get(name), dict) else {}


def _find(name: str, config: Path) -> Path | None:
    places = [Path(), *config.absolute().parents]
    return next((folder / name for folder in places if (folder / name).is_file()), None)
