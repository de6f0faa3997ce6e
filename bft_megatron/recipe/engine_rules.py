"""Checks of flags that Transformer Engine or another package of GPU kernels obeys, and nothing else.

Where the package is missing or the flags contradict each other, Megatron ignores them or fails once the model is built,
after the job has waited for its GPUs. Which packages are there is `installation.layers`' to know.
"""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Any

from bft_megatron.errors import FieldError
from bft_megatron.recipe.layout_rules import ModelShape
from bft_megatron.recipe.schema import Recipe

FP8 = (
    "fp8-recipe fp8-margin fp8-interval fp8-amax-* fp8-quantizer-factory no-fp8-wgrad first-last-layers-bf16 "
    "num-layers-at-*-in-bf16"
)
FP4 = "fp4-recipe fp4-quantizer-factory"
LAYERS = (
    f"fp8-format {FP8} fp4-format {FP4} te-precision-config-file tp-comm-overlap cpu-offloading-num-layers "
    "fine-grained-activation-offloading"
)
"""Flags that Transformer Engine's layers alone obey."""
LEVELS = "hierarchical-context-parallel-sizes"
GPUS = "moe-router-fusion record-memory-history gpu-sniff-test-interval"
"""Flags that a run on the CPU would end at."""
DISPATCHER = "moe-enable-deepep moe-flex-dispatcher-* moe-deepep-* moe-hybridep-* moe-permute-fusion-into-*"
COMMUNICATION = ("p2p", "a2a", "all_gather", "a2a+p2p")
"""Ways of Transformer Engine's attention to share keys and values. Megatron's help writes one of them `allgather`."""
TOKENS, BLOCK_TOKENS = 16, 32
"""Numbers of which the tokens of a product in FP8 must be a multiple, the second with a scale for each block of 32."""
SHARD_TOKENS = 8
"""The same for a tensor rank's share under sequence parallelism."""


def check(recipe: Recipe, model: ModelShape) -> None:
    """Raise FieldError for flags of Transformer Engine or of dispatchers that contradict others or the device."""
    if recipe.device == "cpu" or recipe.layers == "torch":
        cause = "device is cpu" if recipe.device == "cpu" else "layers is torch"
        _refuse(asked(recipe, LAYERS), f"Transformer Engine's layers alone obey it, and {cause}: leave it out")
    if recipe.device == "cpu":
        _refuse(_of_gpus(recipe), "is for GPUs, and device is cpu: leave it out")
    _check_precision(recipe)
    _check_context(recipe, model)
    _check_dispatcher(recipe)
    _check_memory(recipe)


def asked(recipe: Recipe, patterns: str) -> list[str]:
    """Return the recipe's flags, those that it turns off aside, that match one of several patterns."""
    flags = [flag for flag, value in recipe.megatron.items() if value is not None and value is not False]
    return [flag for flag in flags if any(fnmatchcase(flag, pattern) for pattern in patterns.split())]


def _refuse(flags: list[str], reason: str) -> None:
    for flag in flags:
        raise FieldError(f"megatron.{flag}", reason)


def _of_gpus(recipe: Recipe) -> list[str]:
    flags = recipe.megatron
    found = asked(recipe, GPUS)
    if flags.get("moe-token-dispatcher-type") == "flex":
        found.append("moe-token-dispatcher-type")
    if flags.get("profile") and not flags.get("use-pytorch-profiler"):
        found.append("profile")  # it starts CUDA's profiler
    return found


def _check_precision(recipe: Recipe) -> None:
    flags = recipe.megatron
    eight, four = flags.get("fp8-format"), flags.get("fp4-format")
    if eight and four:
        raise FieldError("megatron.fp4-format", "fp8-format is set too: leave one of them out")
    for kind, given, patterns in (("fp8", eight or four, FP8), ("fp4", four, FP4)):
        if not given:
            _refuse(asked(recipe, patterns), f"does nothing without {kind}-format: set that, or leave this out")
    if not (eight or four):
        return
    if recipe.train.precision != "bf16":
        raise FieldError(f"megatron.{'fp8' if eight else 'fp4'}-format", "needs train.precision: bf16")
    _check_scaling(recipe)


def scaling(recipe: Recipe) -> tuple[str, str] | None:
    """Return the flag that names how FP8 or FP4 scales numbers, and its value or default; None without either."""
    for kind, default in (("fp8", "delayed"), ("fp4", "nvfp4")):
        if recipe.megatron.get(f"{kind}-format"):
            return f"{kind}-recipe", str(recipe.megatron.get(f"{kind}-recipe") or default)
    return None


def _check_scaling(recipe: Recipe) -> None:
    flags = recipe.megatron
    flag, name = scaling(recipe) or ("", "")
    kind = flag.removesuffix("-recipe")
    if name == "custom" and not flags.get(f"{kind}-quantizer-factory"):
        raise FieldError(f"megatron.{kind}-recipe", f"custom needs {kind}-quantizer-factory, a Python function's name")
    if name == "delayed":
        refused = asked(recipe, "first-last-layers-bf16")
        if {"moe_act", "layernorm"} & {*_listed(flags.get("recompute-modules"))}:
            refused.append("recompute-modules")
        _refuse(
            refused, "not with fp8-recipe delayed, Megatron's default: set fp8-recipe to tensorwise, blockwise or mxfp8"
        )
    parallel, least = recipe.parallel, BLOCK_TOKENS if name in ("mxfp8", "nvfp4") else TOKENS
    tokens = recipe.data.seq_length * recipe.train.micro_batch_size // parallel.context
    multiple = math.lcm(least, SHARD_TOKENS * parallel.tensor if parallel.sequence_parallel else 1)
    if tokens % multiple:
        raise FieldError(
            "data.seq_length", f"gives a rank {tokens} tokens a micro-batch; {kind} multiplies multiples of {multiple}"
        )


def _check_context(recipe: Recipe, model: ModelShape) -> None:
    kinds = _listed(recipe.megatron.get("cp-comm-type"))
    sizes = _listed(recipe.megatron.get(LEVELS))
    context, tensor = recipe.parallel.context, recipe.parallel.tensor
    if sizes and (len(sizes) != 2 or any(type(s) is not int for s in sizes) or math.prod(sizes) != context):
        raise FieldError(f"megatron.{LEVELS}", f"must be two numbers whose product is parallel.context, {context}")
    for kind in kinds:
        if kind not in COMMUNICATION:
            raise FieldError("megatron.cp-comm-type", f"must be one of {', '.join(COMMUNICATION)}, not {kind!r}")
        if kind == "a2a+p2p" and not sizes:
            raise FieldError(
                "megatron.cp-comm-type", f"a2a+p2p needs {LEVELS}: [ranks that exchange all to all, ranks of a ring]"
            )
    if len(kinds) > 1 and len(kinds) != model.layers:
        raise FieldError("megatron.cp-comm-type", f"names {len(kinds)} layers' ways, and the model has {model.layers}")
    exchanging = context if "a2a" in kinds else sizes[0] if "a2a+p2p" in kinds else 1
    for heads in (model.heads, model.kv_heads):
        if heads // tensor % exchanging:
            raise FieldError(
                "megatron.cp-comm-type",
                f"all-to-all shares out heads, and {exchanging} does not divide the {heads // tensor} of a tensor rank",
            )


def _check_dispatcher(recipe: Recipe) -> None:
    flags, parallel = recipe.megatron, recipe.parallel
    if flags.get("moe-token-dispatcher-type") != "flex":
        _refuse(asked(recipe, DISPATCHER), "does nothing without moe-token-dispatcher-type: flex")
    elif parallel.expert * parallel.expert_tensor == 1:
        raise FieldError("megatron.moe-token-dispatcher-type", "flex needs parallel.expert above 1")


def _check_memory(recipe: Recipe) -> None:
    flags = recipe.megatron
    if flags.get("optimizer-cpu-offload") and not flags.get("use-precision-aware-optimizer"):
        raise FieldError("megatron.optimizer-cpu-offload", "needs use-precision-aware-optimizer: true")
    if flags.get("tp-comm-overlap") and not recipe.parallel.sequence_parallel:
        raise FieldError("megatron.tp-comm-overlap", "needs parallel.tensor above 1 and parallel.sequence")


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
