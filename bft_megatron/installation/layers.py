"""The check that the layers which a recipe asks for are installed."""

from __future__ import annotations

import importlib.util

from bft_megatron.errors import FieldError
from bft_megatron.recipe import layout_rules
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


def transformer_engine_is_there() -> bool:
    """Return whether Transformer Engine is installed, without importing it."""
    return importlib.util.find_spec("transformer_engine") is not None


def check(recipe: Recipe) -> None:
    """Raise FieldError if a recipe asks for Transformer Engine's layers, or needs them, where a run has others."""
    if layout_rules.recomputes_head_norm(recipe) and not transformer_engine_is_there():
        raise FieldError("megatron.recompute-modules", f"{layout_rules.HEAD_NORM_NEEDS}; {INSTALL} installs it")
    if recipe.layers != "transformer_engine":
        return
    if recipe.device == "cpu":
        raise FieldError("layers", "Transformer Engine runs on GPUs alone, and device is cpu: leave it out")
    if not transformer_engine_is_there():
        raise FieldError(
            "layers",
            f"Transformer Engine is not installed: {INSTALL} installs it, `bft-megatron doctor` tells what is there, "
            "and `layers: auto` goes on without",
        )
