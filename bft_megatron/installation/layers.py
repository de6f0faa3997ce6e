"""The check that the layers and the kernels which a recipe asks for are installed."""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from bft_megatron.errors import FieldError
from bft_megatron.installation import driver
from bft_megatron.recipe import engine_rules, layout_rules
from bft_megatron.recipe.schema import Recipe

INSTALL = "launch/install_gpu.sh"
"""The command that installs Transformer Engine for the torch that is there."""
WITHOUT_TRANSFORMER_ENGINE = (
    "the layers are torch's, with flash attention in bf16 and fp16, without Transformer Engine's fused norms, rotary "
    "embedding and FP8"
)
WITHOUT_FLASH_LINEAR_ATTENTION = (
    "gated delta nets, as Qwen3.5 has them, are torch's, one sample of a packed row after the other, which is slower: "
    'pip install "flash-linear-attention~=0.4.0"'
)
RELEASES = {
    "moe-permute-fusion": "2.1",
    "use-precision-aware-optimizer": "2.1",
    "moe-router-fusion": "2.7",
    "fp4-format": "2.7",
}
"""Flag -> the first release of Transformer Engine that Megatron takes its kernels from."""
CAPABILITIES = {
    "delayed": range(89, 1000),
    "tensorwise": range(89, 1000),
    "blockwise": range(90, 1000),
    "mxfp8": range(100, 120),
    "nvfp4": range(100, 1000),
}
"""Recipe of FP8 or FP4 -> compute capabilities, times ten, of the GPUs that Transformer Engine computes it on."""
OFFLOADING = "fine-grained-activation-offloading"
DEEP_EP = "https://github.com/deepseek-ai/DeepEP"


def transformer_engine_is_there() -> bool:
    """Return whether Transformer Engine is installed, without importing it."""
    return importlib.util.find_spec("transformer_engine") is not None


def check(recipe: Recipe) -> None:
    """Raise FieldError if a recipe asks for layers or kernels that are not installed, or where a run has others.

    Megatron would end the ranks at their start or in their first step, or ignore the flag.
    """
    if layout_rules.recomputes_head_norm(recipe) and not transformer_engine_is_there():
        raise FieldError("megatron.recompute-modules", f"{layout_rules.HEAD_NORM_NEEDS}; {INSTALL} installs it")
    if recipe.layers == "transformer_engine":
        _check_layers(recipe)
    _check_engine(recipe)
    _check_gpus(recipe)
    _check_dispatcher(recipe)


def _check_layers(recipe: Recipe) -> None:
    if recipe.device == "cpu":
        raise FieldError("layers", "Transformer Engine runs on GPUs alone, and device is cpu: leave it out")
    if not transformer_engine_is_there():
        raise FieldError(
            "layers",
            f"Transformer Engine is not installed: {INSTALL} installs it, `bft-megatron doctor` tells what is there, "
            "and `layers: auto` goes on without",
        )


def _check_engine(recipe: Recipe) -> None:
    """Check the flags that Transformer Engine obeys."""
    for flag in engine_rules.asked(recipe, f"{engine_rules.LAYERS} {' '.join(RELEASES)}"):
        if flag == "use-precision-aware-optimizer" and recipe.megatron.get("optimizer-cpu-offload"):
            continue  # on the host it is torch's Adam
        if not transformer_engine_is_there():
            raise FieldError(
                f"megatron.{flag}", f"needs Transformer Engine, which is not installed: {INSTALL} installs it"
            )
        if flag in RELEASES and _engine_release() < Version(RELEASES[flag]):
            raise FieldError(
                f"megatron.{flag}", f"needs Transformer Engine {RELEASES[flag]}, and {_engine_release()} is installed"
            )
    if engine_rules.asked(recipe, OFFLOADING) and os.environ.get("NVTE_CPU_OFFLOAD_V1", "0") != "1":
        raise FieldError(f"megatron.{OFFLOADING}", "needs `export NVTE_CPU_OFFLOAD_V1=1`, or weights are offloaded too")


def _check_gpus(recipe: Recipe) -> None:
    """Check that this machine's GPUs compute in the precision that is asked for."""
    flag, scaling = engine_rules.scaling(recipe) or ("", "")
    fit = CAPABILITIES.get(scaling)
    if fit and (others := sorted(capability for capability in driver.capabilities() if capability not in fit)):
        below = f", below sm_{fit.stop}" if fit.stop < 1000 else ""
        raise FieldError(
            f"megatron.{flag}",
            f"{scaling} needs GPUs from sm_{fit.start} on{below}, and this machine has sm_{others[0]}",
        )


def _check_dispatcher(recipe: Recipe) -> None:
    """Check that the package of a flex dispatcher is there."""
    if recipe.megatron.get("moe-token-dispatcher-type") != "flex":
        return
    backend = recipe.megatron.get("moe-flex-dispatcher-backend", "deepep")
    if importlib.util.find_spec("deep_ep") is None:
        branch = "/tree/hybrid-ep" if backend == "hybridep" else ""
        raise FieldError(
            "megatron.moe-token-dispatcher-type",
            f"flex needs DeepEP, which is not installed: {DEEP_EP}{branch}; alltoall, the default, does without",
        )


def _engine_release() -> Version:
    """Return the installed release of Transformer Engine; 0 if its metadata are missing."""
    try:
        return Version(version("transformer-engine"))
    except PackageNotFoundError:
        return Version("0")
