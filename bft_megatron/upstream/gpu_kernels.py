"""The names by which Megatron calls a GPU's fused kernels; `plan` replaces them by kernels that compute shapes only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bft_megatron.upstream.change import Change

_WHY = "A plan without a GPU must allocate what the fused kernel would; the fallback allocates more."
_UNTIL = "never: the kernel needs a GPU"
_TEST = "tests/plan/test_published.py"
_ROPE = "megatron.core.models.common.embeddings.rope_utils"

ADAM = Change("megatron.core.optimizer:Adam", "replaced", _WHY, _UNTIL, _TEST)
IS_TORCHS = Change("megatron.core.optimizer:USING_PYTORCH_OPTIMIZER", "replaced", _WHY, _UNTIL, _TEST)
ROPE = Change(f"{_ROPE}:fused_apply_rotary_pos_emb", "replaced", _WHY, _UNTIL, _TEST)
ROPE_PACKED = Change(f"{_ROPE}:fused_apply_rotary_pos_emb_thd", "replaced", _WHY, _UNTIL, _TEST)
SWIGLU = Change("megatron.core.transformer.mlp:bias_swiglu_impl", "replaced", _WHY, _UNTIL, _TEST)
GATED_NORM = Change(
    "megatron.core.ssm.gated_delta_net.common:_GDNBase._apply_gated_norm",
    *("replaced", _WHY, _UNTIL, _TEST, ("self", "x", "gate")),
)
OUTPUT_GATE = Change(
    "megatron.core.transformer.attention:Attention._apply_output_gate",
    *("replaced", _WHY, _UNTIL, _TEST, ("self", "x", "gate")),
)


def use(adam: type, rope: Callable[[Tensor], Tensor], swiglu: Callable[[Tensor], Tensor]) -> None:
    """Have Megatron use these kernels for the rest of this process.

    Args:
        adam: the optimizer class, with the constructor of a fused Adam.
        rope: the rotary embedding of a packed or padded tensor; keeps its shape.
        swiglu: [..., 2f] -> [..., f].
    """

    def first_argument(kernel: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, *_: Any, **__: Any) -> Tensor:
            return kernel(x)

        return call

    ADAM.put(adam)
    IS_TORCHS.put(False)
    ROPE.put(first_argument(rope))
    ROPE_PACKED.put(first_argument(rope))
    SWIGLU.put(first_argument(swiglu))


def use_gates(norm: Callable[[Any, Tensor, Tensor], Tensor], gate: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    """Have layers with gates, which Megatron compiles on a GPU, use these kernels for the rest of this process.

    Args:
        norm: of a gated delta net, its heads' outputs and their gates [..., dv] -> [n, dv].
        gate: of an attention, its output and the gate of it; keeps the output's shape.
    """
    GATED_NORM.put(norm)
    OUTPUT_GATE.put(gate)
