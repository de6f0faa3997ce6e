"""A layer spec that allocates like Transformer Engine's, for planning a GPU step without a GPU.

Each operator here stands for a kernel that needs a GPU. `MODELLED` lists what each kernel is assumed to keep, with the
source. The rest of the planned step, Megatron's code and ours, runs unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelConfig
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from bft_megatron.layers import spec
from bft_megatron.plan import modelled_delta_net
from bft_megatron.plan.kernels import OPS, kernel
from bft_megatron.plan.modelled_experts import GroupedExperts
from bft_megatron.upstream import gated_delta, gpu_kernels

MODELLED = {
    "attention": "keeps q, k, v, out and an fp32 log-sum-exp a row; no scores [FlashAttention; Transformer Engine "
    "attention/dot_product_attention/backends.py]",
    "context parallelism": "keys and values pass round the ring, cp buffers of them at once, one kept; outputs of all "
    "steps until they are corrected [Transformer Engine context_parallel.py, AttnFuncWithCPAndKVP2P]",
    "norm": "keeps its input, which the residual shares, and an fp32 number a row [Transformer Engine "
    "module/layernorm_linear.py: inputmat, rsigma; its output is the linear layer's saved input, ln_out]",
    "SwiGLU": "keeps its input alone, no temporaries [Megatron core/fusions/fused_bias_swiglu.py, compiled]",
    "rotary embedding": "keeps nothing of its input [Transformer Engine attention/rope.py]",
    "Adam": "two fp32 moments a parameter, no temporaries [Transformer Engine optimizers/fused_adam.py]",
    "weight gradients": "made in the weights' dtype, then added: without apex's fused accumulation "
    "[Megatron core/tensor_parallel/layers.py]",
}
"""Kernel -> its assumed allocations [and their source]."""


@kernel("norm(Tensor x, Tensor weight) -> (Tensor, Tensor)")
def _(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


@kernel("norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rsigma) -> (Tensor, Tensor)")
def _(grad: Tensor, x: Tensor, weight: Tensor, rsigma: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


@kernel("swiglu(Tensor x) -> Tensor")
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@kernel("swiglu_backward(Tensor grad, Tensor x) -> Tensor")
def _(grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


@kernel("rope(Tensor x) -> Tensor")
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@kernel("attention(Tensor q, Tensor k, Tensor v, int pairs) -> (Tensor, Tensor)")
def _(q: Tensor, k: Tensor, v: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    return q.new_empty(*q.shape[:-1], v.shape[-1]), lse


@kernel(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, int pairs) -> (Tensor, Tensor, Tensor)"
)
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@kernel("adam(Tensor[] parameters, Tensor[] gradients, Tensor[] first, Tensor[] second) -> Tensor")
def _(parameters: list[Tensor], gradients: list[Tensor], first: list[Tensor], second: list[Tensor]) -> Tensor:
    return parameters[0].new_empty(1)


def _attention_flops(q: Any, k: Any, v: Any, pairs: int, out_val: Any = None, **_: Any) -> int:
    """Return the FLOPs of two products: scores and output."""
    return 4 * pairs * q.shape[-1] * q.shape[-2]


def _attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, out: Any, pairs: int, **_: Any) -> int:
    """Return the FLOPs of five products: scores again, gradients of values, probabilities, queries and keys."""
    return 10 * pairs * q.shape[-1] * q.shape[-2]


flop_registry[OPS.attention] = _attention_flops
flop_registry[OPS.attention_backward] = _attention_backward_flops


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        out, rsigma = OPS.norm(x, weight)
        ctx.save_for_backward(x, weight, rsigma)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return OPS.norm_backward(grad, *ctx.saved_tensors)


class Norm(torch.nn.RMSNorm):
    """An RMSNorm whose weight gradient `finalize_model_grads` sums over TP under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device="meta")
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron's mark

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., h] -> [..., h]."""
        return _Norm.apply(x, self.weight)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return OPS.swiglu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return OPS.swiglu_backward(grad, *ctx.saved_tensors)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return OPS.rope(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return OPS.rope(grad)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pairs: int, group: dist.ProcessGroup) -> Tensor:
        if group.size() == 1:
            out, lse = OPS.attention(q, k, v, pairs)
        else:
            out, lse, k, v = _ring_forward(q, k, v, pairs, group)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.pairs, ctx.group = pairs, group
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, _ = ctx.saved_tensors
        if ctx.group.size() == 1:
            return *OPS.attention_backward(grad, q, k, v, out, ctx.pairs), None, None
        return *_ring_backward(grad, q, k, v, out, ctx.pairs, ctx.group), None, None


def _pass_on(send: Tensor, receive: Tensor, group: dist.ProcessGroup) -> None:
    rank, size = group.rank(), group.size()
    ranks = dist.get_process_group_ranks(group)
    dist.isend(send, ranks[(rank + 1) % size], group=group)
    dist.irecv(receive, ranks[(rank - 1) % size], group=group)


def _ring_forward(
    q: Tensor, k: Tensor, v: Tensor, pairs: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = group.size()
    buffers = [torch.cat((k.reshape(-1), v.reshape(-1)))]
    outputs = []
    for _ in range(size):
        if len(buffers) < size:
            buffers.append(torch.empty_like(buffers[-1]))
            _pass_on(buffers[-2], buffers[-1], group)
        outputs.append(OPS.attention(q, k, v, pairs // size))
    out, lse = torch.empty_like(outputs[0][0]), outputs[0][1]
    k, v = (x.view(k.shape) for x in buffers[-1].chunk(2))
    return out, lse, k, v


def _ring_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, pairs: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    size = group.size()
    buffers = [k.new_empty(2, 2, *k.shape) for _ in range(2)]  # keys and values, and their gradients; send and receive
    dq = torch.empty_like(q)
    for i in range(size):
        _pass_on(buffers[i % 2], buffers[(i + 1) % 2], group)
        part = OPS.attention_backward(grad, q, k, v, out, pairs // size)
        dq.add_(part[0])
        buffers[i % 2][1].add_(torch.stack(part[1:]))
    return dq, buffers[0][1, 0].clone(), buffers[0][1, 1].clone()


class Attention(torch.nn.Module):
    """Causal attention over rows that one sample fills, which take the most time and memory.

    With CP a rank attends from its 1/cp of the queries to all keys.
    """

    def __init__(self, config: TransformerConfig, *_: Any, pg_collection: ProcessGroupCollection, **__: Any) -> None:
        super().__init__()
        self.group, self.window = pg_collection.cp, config.window_size

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend from query [t/cp, n, d] (packed) or [s/cp, b, n, d] -> [..., n*d]."""
        cp = self.group.size()
        s, b = query.shape[0] * cp, 1 if query.dim() == 3 else query.shape[1]
        reach = s if self.window is None else min(s, self.window[0] + 1)
        pairs = b * (s * reach - reach * reach // 2) // cp
        return _Attention.apply(query, key, value, pairs, self.group).flatten(-2)


class FusedAdam(torch.optim.Optimizer):
    """An Adam whose step allocates the two moments, once, and nothing else."""

    def __init__(self, params: Any, lr: float = 1e-3, **settings: Any) -> None:
        super().__init__(params, {"lr": lr, **settings})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # Megatron passes no closure
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            if parameters:
                moments = [[self.state[p][name] for p in parameters] for name in ("exp_avg", "exp_avg_sq")]
                OPS.adam(parameters, [p.grad for p in parameters], *moments)


def layer_spec(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Return the decoder's spec for `GPTModelConfig.transformer_layer_spec`."""

    def make(experts: bool, linear: bool) -> ModuleSpec:
        made = spec.layer(config.transformer, Norm, Attention, experts=experts, linear=linear)
        if linear:
            gated_delta.use(*modelled_delta_net.KERNELS)  # after the spec, which has put those in torch
        if experts:
            made.submodules.mlp.keywords["submodules"].experts = GroupedExperts
        return made

    return TransformerBlockSubmodules(layer_specs=spec.layers(config.transformer, vp_stage, make), layer_norm=Norm)


def install() -> None:
    """Have Megatron use the modelled kernels in place of the GPU's for the rest of this process."""
    gpu_kernels.use(FusedAdam, _Rope.apply, _SwiGLU.apply)
    gpu_kernels.use_gates(modelled_delta_net.gated_norm, modelled_delta_net.output_gate)
