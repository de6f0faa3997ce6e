"""Kernels on a GPU that other packages bring: which of them this installation has, and what a run costs without.

Megatron uses a kernel for experts only where a flag asks for it, and may end the run where the kernel is missing.
"""

from __future__ import annotations

from dataclasses import dataclass

from bft_megatron.installation.layers import WITHOUT_FLASH_LINEAR_ATTENTION, WITHOUT_TRANSFORMER_ENGINE
from bft_megatron.upstream import gated_delta

ONE_AFTER_THE_OTHER = "a layer's experts are multiplied one after the other, each too small a product to fill the GPU"
SEVERAL_PASSES = "tokens are sorted by expert in several passes over memory, with a copy each"


@dataclass(frozen=True)
class ExpertKernel:
    """A kernel for experts, with what a run does without it."""

    flag: str
    """Megatron's."""
    name: str
    """The name in `megatron.core.extensions.transformer_engine`, which is None where the kernel is missing."""
    release: str
    """The first of Transformer Engine that has it."""
    without: str

    def is_there(self) -> bool:
        """Return whether the installed Transformer Engine has it. Imports it."""
        from megatron.core.extensions import transformer_engine

        return getattr(transformer_engine, self.name) is not None


EXPERT_KERNELS = (
    ExpertKernel("moe-grouped-gemm", "TEColumnParallelGroupedLinear", "1.9", ONE_AFTER_THE_OTHER),
    ExpertKernel("moe-permute-fusion", "fused_permute", "2.1", SEVERAL_PASSES),
)


def expert_flags() -> list[str]:
    """Return Megatron's flags for the kernels that this installation has for experts."""
    return [f"--{kernel.flag}" for kernel in EXPERT_KERNELS if kernel.is_there()]


def missing(*, torch_layers: bool, experts: bool, delta_nets: bool) -> list[str]:
    """Return a sentence for each thing that a GPU does more slowly on this installation than it could.

    Args:
        torch_layers: whether the package's own layers are used, for want of Transformer Engine.
        experts: whether the model has experts.
        delta_nets: whether it has gated delta nets.
    """
    slow_nets = [WITHOUT_FLASH_LINEAR_ATTENTION] if delta_nets and not gated_delta.fla_is_used() else []
    if torch_layers:
        slow = f"; {ONE_AFTER_THE_OTHER}, and {SEVERAL_PASSES}"
        return [WITHOUT_TRANSFORMER_ENGINE + slow * experts, *slow_nets]
    return slow_nets + [
        f"Transformer Engine lacks {kernel.flag}, which {kernel.release} has: {kernel.without}"
        for kernel in EXPERT_KERNELS
        if experts and not kernel.is_there()
    ]
