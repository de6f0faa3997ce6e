"""The table of parameters: which Hugging Face tensors make up each of Megatron's parameters, and in which layout.

Loading, export and adapters all use it. A Megatron parameter joins one or more Hugging Face tensors by rows, in
`blocks`: query, key and value are interleaved per key/value group, gate and up are stacked in one block. Under tensor
parallelism a rank holds its part of *every* joined tensor, joined by the same rule.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bft_megatron.hf.architectures import ModelConfig


@dataclass(frozen=True)
class HFTensor:
    """A tensor of the Hugging Face model."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """A whole parameter of Megatron's model (not sharded over TP) and its Hugging Face tensors."""

    name: str
    """Name within its layer, or within the model, as in a checkpoint, where norms have Transformer Engine's names."""
    layer: int | None
    """Layer number from 0 over the whole model; None outside the layers."""
    tensors: tuple[HFTensor, ...]
    axis: int | None
    """The axis that is sharded over TP; None: every rank has the whole parameter."""
    blocks: int = 1
    """Number of blocks of rows in which the tensors are interleaved; TP shards the blocks too."""
    padded: bool = False
    """Whether the rows are the vocabulary, to which Megatron adds rows of zeros."""

    @property
    def path(self) -> str:
        """Name in the whole model, such as `decoder.layers.7.mlp.linear_fc1.weight`."""
        return self.name if self.layer is None else f"decoder.layers.{self.layer}.{self.name}"


def weights(config: ModelConfig) -> list[Weight]:
    """Return every parameter of the model, in the order of the layers; tied embeddings once."""
    h, v = config.hidden, config.vocab_size
    embedding = HFTensor("model.embed_tokens.weight", (v, h))
    norm = HFTensor("model.norm.weight", (h,))
    head = HFTensor("lm_head.weight", (v, h))
    return [
        Weight("embedding.word_embeddings.weight", None, (embedding,), 0, padded=True),
        *(w for layer in range(config.layers) for w in _layer_weights(config, layer)),
        Weight("decoder.final_layernorm.weight", None, (norm,), None),
        *([] if config.tied else [Weight("output_layer.weight", None, (head,), 0, padded=True)]),
    ]


def parameter_count(config: ModelConfig) -> int:
    """Return the number of parameters of the whole model, tied embeddings counted once."""
    return sum(math.prod(t.shape) for w in weights(config) for t in w.tensors)


def _layer_weights(config: ModelConfig, layer: int) -> list[Weight]:
    h, ffn, d, groups = config.hidden, config.ffn, config.head_dim, config.kv_heads
    q, kv = config.heads * d, groups * d

    def weight(name: str, tensors: dict[str, tuple[int, ...]], axis: int | None = None, blocks: int = 1) -> Weight:
        return Weight(
            name, layer, tuple(HFTensor(f"model.layers.{layer}.{n}", s) for n, s in tensors.items()), axis, blocks
        )

    def qkv(kind: str, *columns: int) -> Weight:
        shapes = {f"self_attn.{x}_proj.{kind}": (n, *columns) for x, n in (("q", q), ("k", kv), ("v", kv))}
        return weight(f"self_attention.linear_qkv.{kind}", shapes, axis=0, blocks=groups)

    return [
        weight("self_attention.linear_qkv.layer_norm_weight", {"input_layernorm.weight": (h,)}),
        qkv("weight", h),
        *([qkv("bias")] if config.qkv_bias else []),
        *(
            [weight(f"self_attention.{x}_layernorm.weight", {f"self_attn.{x}_norm.weight": (d,)}) for x in "qk"]
            if config.qk_norm
            else []
        ),
        weight("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": (h, q)}, axis=1),
        weight("mlp.linear_fc1.layer_norm_weight", {"post_attention_layernorm.weight": (h,)}),
        weight("mlp.linear_fc1.weight", {"mlp.gate_proj.weight": (ffn, h), "mlp.up_proj.weight": (ffn, h)}, axis=0),
        weight("mlp.linear_fc2.weight", {"mlp.down_proj.weight": (h, ffn)}, axis=1),
    ]


# In the local layer spec norms are separate modules, in Transformer Engine's they are part of the next linear layer.
_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def global_path(parameter: str, layer_numbers: Sequence[int]) -> str:
    """Return the `Weight.path` of a parameter in a pipeline chunk with these layer numbers (from 1, over the model)."""

    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", parameter)
    if match is None:
        return parameter
    return f"decoder.layers.{layer_numbers[int(match[1])] - 1}.{_NORMS.get(match[2], match[2])}"


def join(tensors: Sequence[Tensor], blocks: int) -> Tensor:
    """Join tensors [rows_i, ...] as Megatron does, [sum of rows_i, ...]: each block has a part of every tensor."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat([t.unflatten(0, (blocks, -1)) for t in tensors], 1).flatten(0, 1)


def part(weight: Weight, index: int, joined: Tensor) -> Tensor:
    """Return the Hugging Face tensor number `index` of a whole joined parameter: the inverse of `join`."""
    rows = [t.shape[0] // weight.blocks for t in weight.tensors]
    first = sum(rows[:index])
    blocks: Tensor = joined.unflatten(0, (weight.blocks, -1))
    return blocks[:, first : first + rows[index]].flatten(0, 1)
