"""A norm of each query's and key's head after the rotary embedding, where Megatron's own comes before it.

The core attention is given query and key after the embedding, so it norms them first: this package's core attention
and Transformer Engine's alike, with the same names of parameters and the same keys in a checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec
from torch import Tensor

Spec = Callable[..., TransformerBlockSubmodules]
"""A function for `GPTModelConfig.transformer_layer_spec`: of the model's configuration and `vp_stage`."""


def norm_after_rotary(spec: Spec | None) -> Spec:
    """Return a layer spec, of a block, whose core attention norms query and key; None: of Megatron's default spec."""

    def normed(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        block = (spec or default_layer_spec)(config, vp_stage)
        for layer in block.layer_specs:
            attention = layer.submodules.self_attention.submodules
            attention.core_attention = _norming(attention.core_attention, block.layer_norm)
        return block

    return normed


class _Norming:
    """The norms before a core attention, each with weight [d]."""

    make_norm: Callable[..., Any]

    def __init__(
        self, config: TransformerConfig, *args: Any, pg_collection: ProcessGroupCollection, **kwargs: Any
    ) -> None:
        super().__init__(config, *args, pg_collection=pg_collection, **kwargs)  # type: ignore[call-arg]
        self.heads_group = pg_collection.tp
        d, eps = config.kv_channels, config.layernorm_epsilon
        self.q_layernorm = self.make_norm(config=config, hidden_size=d, eps=eps)
        self.k_layernorm = self.make_norm(config=config, hidden_size=d, eps=eps)

    def forward(self, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attend from query [..., n, d] to key [..., g, d] both normed; the others are the core attention's."""
        query, key = self.q_layernorm(query), self.k_layernorm(key)
        out: Tensor = super().forward(query, key, *args, **kwargs)  # type: ignore[misc]
        return out

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the norms' tensors, whole on every tensor-parallel rank, and the core attention's own if any."""
        own = getattr(super(), "sharded_state_dict", None)
        found: dict[str, Any] = own(prefix, sharded_offsets, metadata) if own else {}
        for name in ("q_layernorm", "k_layernorm"):
            at = f"{prefix}{name}."
            found |= sharded_state_dict_default(getattr(self, name), at, sharded_offsets, metadata, self.heads_group)
        return found


@functools.cache
def _norming(core: type, norm: Any) -> type:
    """Return a class of the core attention that norms first; of such a class itself, if layers share a spec."""
    if issubclass(core, _Norming):
        return core
    return type(f"Norming{core.__name__}", (_Norming, core), {"make_norm": staticmethod(norm)})
