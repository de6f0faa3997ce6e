"""A core attention that norms query and key first: what it computes, and what a checkpoint holds of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from bft_megatron.layers.attention import CoreAttention
from bft_megatron.layers.norm import RMSNorm
from bft_megatron.layers.norm_after_rotary import norm_after_rotary
from tests.helpers.world import run_world

DIM, EPS = 8, 1e-5


def _build(core: type, config: Any) -> Any:
    groups = SimpleNamespace(cp=dist.new_group([0]), tp=dist.group.WORLD)
    return core(config, 1, None, "self", pg_collection=groups)


def _computed() -> tuple[torch.Tensor, torch.Tensor, set[str]]:
    """Attention of a spec whose two layers share one module, of inputs normed by hand, and the names of its norms."""
    config = SimpleNamespace(
        window_size=None,
        attention_dropout=0.0,
        kv_channels=DIM,
        layernorm_epsilon=EPS,
        sequence_parallel=False,
        layernorm_zero_centered_gamma=False,
    )
    attention = SimpleNamespace(core_attention=CoreAttention)
    layer = SimpleNamespace(submodules=SimpleNamespace(self_attention=SimpleNamespace(submodules=attention)))
    block = TransformerBlockSubmodules(layer_specs=[layer, layer], layer_norm=RMSNorm)
    norm_after_rotary(lambda *_: block)(SimpleNamespace())
    normed, plain = _build(attention.core_attention, config), _build(CoreAttention, config)
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(6, 2, n, DIM, generator=generator) for n in (4, 2, 2))
    weights = torch.rand(2, DIM, generator=generator) + 0.5
    with torch.no_grad():
        normed.q_layernorm.weight.copy_(weights[0])
        normed.k_layernorm.weight.copy_(weights[1])
    pairs = zip((query, key), weights, strict=True)
    by_hand = [x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * w for x, w in pairs]
    return normed(query, key, value, None).detach(), plain(*by_hand, value, None), set(dict(normed.named_parameters()))


def test_query_and_key_are_normed_once() -> None:
    [(found, expected, names)] = run_world(1, _computed, megatron=True)
    torch.testing.assert_close(found, expected)
    assert names == {"q_layernorm.weight", "k_layernorm.weight"}
