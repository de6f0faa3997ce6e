"""A gated delta net's kernels, for planning a GPU step: memory and work of flash-linear-attention's Triton kernels.

The rule is one operator for each of their launches, in their order, so that what lives within a pass is counted too.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from bft_megatron.plan.kernels import OPS, kernel

CHUNK = 64
"""Tokens of a chunk."""

MODELLED = {
    "gated delta rule": "keeps q, k (repeated for each value head), v, the decays' sums in fp32, beta, and 64 numbers "
    "a token and head, the solved system of its chunk; the states, dk x dv a chunk and head, are made again in the "
    "backward pass, in which w, u, both kinds of states and all gradients live at once [flash-linear-attention "
    "ops/gated_delta_rule/chunk.py, ops/common/chunk_delta_h.py, ops/common/chunk_o.py]",
    "FLOPs of the rule": "with C = 64, a token and head: 6 dk dv + C (6 dk + 4 dv) + C^2 / 2 forward, "
    "16 dk dv + C (20 dk + 10 dv) + 4 C^2 backward, whatever the row's length [the products of its kernels]",
    "convolution": "keeps its input, by which all of the in-projection's output stays; its backward makes the output "
    "again, and an fp32 gradient of the taps a chunk [flash-linear-attention modules/conv/triton/ops.py]",
    "length of query and key": "keeps its output and an fp32 number a head [flash-linear-attention modules/l2norm.py]",
    "gated norm": "keeps its input, the gate and an fp32 number a head, no temporaries [Megatron "
    "core/ssm/gated_delta_net/common.py, _apply_gated_norm, compiled]",
    "gate of attention's output": "keeps its input and the gate, no temporaries [Megatron "
    "core/transformer/attention.py, _apply_output_gate, compiled]",
}
"""Kernel -> its assumed allocations [and their source]."""


@kernel("l2norm(Tensor x) -> (Tensor, Tensor)")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


@kernel("l2norm_backward(Tensor grad, Tensor y, Tensor rstd) -> Tensor")
def _(grad: Tensor, y: Tensor, rstd: Tensor) -> Tensor:
    return torch.empty_like(y)


@kernel("convolution(Tensor x, Tensor weight) -> Tensor")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@kernel("convolution_backward(Tensor grad, Tensor x, Tensor y, Tensor weight) -> (Tensor, Tensor)")
def _(grad: Tensor, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), weight.new_empty(x.shape[0] * _chunks(x), *weight.shape, dtype=torch.float32)


@kernel("gate(Tensor x, Tensor gate) -> Tensor")
def _(x: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(x)


@kernel("gate_backward(Tensor grad, Tensor x, Tensor gate) -> (Tensor, Tensor)")
def _(grad: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(gate)


@kernel("gated_norm(Tensor x, Tensor gate, Tensor weight) -> (Tensor, Tensor)")
def _(x: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


@kernel(
    "gated_norm_backward(Tensor grad, Tensor x, Tensor gate, Tensor weight, Tensor rstd) -> (Tensor, Tensor, Tensor)"
)
def _(grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(gate), torch.empty_like(weight)


@kernel("delta_solve(Tensor k, Tensor g, Tensor beta) -> Tensor")
def _(k: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    return k.new_empty(*k.shape[:-1], CHUNK)


@kernel("delta_values(Tensor k, Tensor v, Tensor g, Tensor beta, Tensor solved) -> (Tensor, Tensor)")
def _(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, solved: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(k), torch.empty_like(v)


@kernel("delta_states(Tensor k, Tensor w, Tensor u, Tensor g) -> (Tensor, Tensor)")
def _(k: Tensor, w: Tensor, u: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return _states(k, u), torch.empty_like(u)


@kernel("delta_outputs(Tensor q, Tensor k, Tensor stored, Tensor states, Tensor g) -> Tensor")
def _(q: Tensor, k: Tensor, stored: Tensor, states: Tensor, g: Tensor) -> Tensor:
    return torch.empty_like(stored)


@kernel("delta_outputs_backward(Tensor grad, Tensor q, Tensor k, Tensor g) -> Tensor")
def _(grad: Tensor, q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    return torch.empty_like(grad)


@kernel("delta_states_backward(Tensor grad, Tensor q, Tensor k, Tensor w, Tensor g, Tensor stored) -> (Tensor, Tensor)")
def _(grad: Tensor, q: Tensor, k: Tensor, w: Tensor, g: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
    return _states(k, stored), torch.empty_like(stored)


@kernel(
    "delta_keys_backward(Tensor grad, Tensor q, Tensor k, Tensor w, Tensor g, Tensor stored, Tensor d_stored, "
    "Tensor states, Tensor d_states) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    w: Tensor,
    g: Tensor,
    stored: Tensor,
    d_stored: Tensor,
    states: Tensor,
    d_states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(w), torch.empty_like(g)


@kernel(
    "delta_values_backward(Tensor d_w, Tensor d_u, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor solved) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)
def _(
    d_w: Tensor, d_u: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, solved: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(k), torch.empty_like(v), torch.empty_like(g), torch.empty_like(beta)


def _chunks(x: Tensor) -> int:
    return -(-x.shape[1] // CHUNK)


def _states(k: Tensor, v: Tensor) -> Tensor:
    """Return the states [b, chunks, n, dk, dv] of k [b, s, n, dk] and v [b, s, n, dv]."""
    return k.new_empty(k.shape[0], _chunks(k), k.shape[2], k.shape[-1], v.shape[-1])


def _register(name: str, state: int, key: int, value: int, chunk: float, at: tuple[int, int]) -> None:
    """Register an operator's FLOPs of a token and head: state dk dv + C (key dk + value dv) + chunk C^2.

    Args:
        at: places of k and of v, or what has its shape, among the operator's arguments.
    """

    def flops(*args: Any, out_val: Any = None) -> int:
        k, v = (args[i] for i in at)
        (b, s, n, dk), dv = k.shape, v.shape[-1]
        return int(b * s * n * (state * dk * dv + CHUNK * (key * dk + value * dv) + chunk * CHUNK**2))

    flop_registry[getattr(OPS, name)] = flops


_register("delta_solve", 0, 2, 0, 0.5, (0, 0))
_register("delta_values", 0, 2, 2, 0, (0, 1))
_register("delta_states", 4, 0, 0, 0, (0, 2))
_register("delta_outputs", 2, 2, 2, 0, (1, 2))
_register("delta_outputs_backward", 0, 2, 2, 0, (2, 0))
_register("delta_states_backward", 6, 0, 0, 0, (2, 5))
_register("delta_keys_backward", 6, 6, 2, 0, (2, 5))
_register("delta_values_backward", 0, 10, 4, 4, (2, 3))


class _L2Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, rstd = OPS.l2norm(x)
        ctx.save_for_backward(y, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return OPS.l2norm_backward(grad.contiguous(), *ctx.saved_tensors)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return OPS.convolution(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dx, parts = OPS.convolution_backward(grad, x, OPS.convolution(x, weight), weight)
        return dx, parts.sum(0).to(weight.dtype)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate)
        return OPS.gate(x, gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return OPS.gate_backward(grad, *ctx.saved_tensors)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        out, rstd = OPS.gated_norm(x, gate, weight)
        ctx.save_for_backward(x, gate, weight, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return OPS.gated_norm_backward(grad, *ctx.saved_tensors)


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        g = g.cumsum(1)
        solved = OPS.delta_solve(k, g, beta)
        w, u = OPS.delta_values(k, v, g, beta, solved)
        states, stored = OPS.delta_states(k, w, u, g)
        ctx.save_for_backward(q, k, v, g, beta, solved)
        return OPS.delta_outputs(q, k, stored, states, g)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        q, k, v, g, beta, solved = ctx.saved_tensors
        w, u = OPS.delta_values(k, v, g, beta, solved)
        states, stored = OPS.delta_states(k, w, u, g)
        d_stored = OPS.delta_outputs_backward(grad, q, k, g)
        d_states, d_stored = OPS.delta_states_backward(grad, q, k, w, g, d_stored)
        dq, dk, dw, dg = OPS.delta_keys_backward(grad, q, k, w, g, stored, d_stored, states, d_states)
        more_dk, dv, more_dg, d_beta = OPS.delta_values_backward(dw, d_stored, k, v, g, beta, solved)
        return dq, dk.add_(more_dk), dv, dg.add_(more_dg).cumsum(1), d_beta


def _l2norm(x: Tensor, **_: Any) -> Tensor:
    return _L2Norm.apply(x)


def _convolution(x: Tensor, weight: Tensor, **_: Any) -> tuple[Tensor, None]:
    return _Convolution.apply(x, weight), None


def _rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **_: Any) -> tuple[Tensor, None]:
    return _Rule.apply(q, k, v, g, beta), None


KERNELS = (_l2norm, _convolution, _rule)
"""The three functions that `upstream.gated_delta.use` takes."""


def gated_norm(net: Any, x: Tensor, gate: Tensor) -> Tensor:
    """Stand for a gated delta net's `_apply_gated_norm` with our head norm, which sums its gradient over TP."""
    weight = tensor_parallel.copy_to_tensor_model_parallel_region(net.out_norm.weight, net.pg_collection.tp)
    return _GatedNorm.apply(x.flatten(0, -2), gate.flatten(0, -2), weight)


def output_gate(_: Any, x: Tensor, gate: Tensor) -> Tensor:
    """Stand for an attention's `_apply_output_gate`."""
    return _Gate.apply(x, gate.contiguous().view(x.shape))
