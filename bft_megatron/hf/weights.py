"""The table of parameters: which Hugging Face tensors make up each of Megatron's parameters, and in which layout.

Loading, export and adapters all use it. A Megatron parameter joins one or more Hugging Face tensors by rows, in
`blocks`: query, key and value are interleaved per key/value group, gate and up are stacked in one block. Under tensor
parallelism a rank holds its part of *every* joined tensor, joined by the same rule.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bft_megatron.hf.model_config import Experts, ModelConfig


@dataclass(frozen=True)
class HFTensor:
    """A tensor of the Hugging Face model."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """A whole parameter of Megatron's model (not sharded over TP) and its Hugging Face tensors."""

    name: str
    """Name within its layer, or within the model, as in a checkpoint, where norms have Transformer Engine's names and
    all experts one name, such as `mlp.experts.experts.linear_fc1.weight`."""
    layer: int | None
    """Layer number from 0 over the whole model; None outside the layers."""
    tensors: tuple[HFTensor, ...]
    axis: int | None
    """The axis that is sharded over TP, of an expert over expert-TP; None: every rank has the whole parameter."""
    blocks: int = 1
    """Number of blocks of rows in which the tensors are interleaved; TP shards the blocks too."""
    padded: bool = False
    """Whether the rows are the vocabulary, to which Megatron adds rows of zeros."""
    expert: int | None = None
    """Expert number from 0 over the whole layer; None outside the experts."""
    buffer: bool = False
    """Whether it is a buffer: no gradient changes it, and it is fp32 beside weights of any dtype."""

    @property
    def path(self) -> str:
        """Name in the whole model, such as `decoder.layers.7.mlp.experts.3.linear_fc1.weight`."""
        name = self.name if self.expert is None else self.name.replace(".experts.experts.", f".experts.{self.expert}.")
        return name if self.layer is None else f"decoder.layers.{self.layer}.{name}"


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
    """Return the number of parameters of the whole model, tied embeddings counted once and buffers not."""
    return sum(math.prod(t.shape) for w in weights(config) if not w.buffer for t in w.tensors)


class _Layer:
    """A maker of the weights of one layer."""

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def weight(
        self,
        name: str,
        tensors: dict[str, tuple[int, ...]],
        axis: int | None = None,
        blocks: int = 1,
        expert: int | None = None,
    ) -> Weight:
        """Return a weight of the layer; `tensors` are the shapes by Hugging Face name without `model.layers.N.`."""
        named = tuple(HFTensor(f"model.layers.{self.layer}.{n}", shape) for n, shape in tensors.items())
        return Weight(name, self.layer, named, axis, blocks, expert=expert)

    def network(
        self, at: str, hf: str, matrices: tuple[str, str, str], h: int, ffn: int, expert: int | None = None
    ) -> list[Weight]:
        """Return the two weights of a gated feed-forward network.

        Args:
            at: Megatron's name of the network.
            hf: Hugging Face's pattern of its matrices, with `{matrix}`.
            matrices: Hugging Face's names of gate, up and down.
        """
        gate, up, down = (f"{hf.format(matrix=matrix)}.weight" for matrix in matrices)
        return [
            self.weight(f"{at}.linear_fc1.weight", {gate: (ffn, h), up: (ffn, h)}, axis=0, expert=expert),
            self.weight(f"{at}.linear_fc2.weight", {down: (h, ffn)}, axis=1, expert=expert),
        ]


def _layer_weights(config: ModelConfig, number: int) -> list[Weight]:
    layer, h = _Layer(number), config.hidden
    if config.experts is not None and config.has_experts(number):
        return [*_attention(config, layer), *_mixture(config.experts, layer, h)]
    matrices = ("gate_proj", "up_proj", "down_proj")
    return [
        *_attention(config, layer),
        layer.weight("mlp.linear_fc1.layer_norm_weight", {"post_attention_layernorm.weight": (h,)}),
        *layer.network("mlp", "mlp.{matrix}", matrices, h, config.ffn),
    ]


def _attention(config: ModelConfig, layer: _Layer) -> list[Weight]:
    h, d, groups = config.hidden, config.head_dim, config.kv_heads
    q, kv = config.heads * d, groups * d

    def qkv(kind: str, *columns: int) -> Weight:
        shapes = {f"self_attn.{x}_proj.{kind}": (n, *columns) for x, n in (("q", q), ("k", kv), ("v", kv))}
        return layer.weight(f"self_attention.linear_qkv.{kind}", shapes, axis=0, blocks=groups)

    return [
        layer.weight("self_attention.linear_qkv.layer_norm_weight", {"input_layernorm.weight": (h,)}),
        qkv("weight", h),
        *([qkv("bias")] if config.qkv_bias else []),
        *(_query_and_key_norms(config, layer) if config.qk_norm else []),
        layer.weight("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": (h, q)}, axis=1),
    ]


def _query_and_key_norms(config: ModelConfig, layer: _Layer) -> list[Weight]:
    """Return the norms of the heads; after the rotary embedding they are a part of the core attention."""
    at, names = "self_attention", {"q": "q_norm", "k": "k_norm"}
    if config.norm_after_rotary:
        at, names = "self_attention.core_attention", {"q": "query_layernorm", "k": "key_layernorm"}
    shape = (config.head_dim,)
    return [layer.weight(f"{at}.{x}_layernorm.weight", {f"self_attn.{n}.weight": shape}) for x, n in names.items()]


def _mixture(experts: Experts, layer: _Layer, h: int) -> list[Weight]:
    """Return a layer's norm, router, shared network and experts; the norm is a module of its own in every spec."""
    names, found = experts.names, list[Weight]()
    found.append(layer.weight("pre_mlp_layernorm.weight", {"post_attention_layernorm.weight": (h,)}))
    found.append(layer.weight("mlp.router.weight", {f"{names.router}.weight": (experts.count, h)}))
    if names.correction:
        bias = layer.weight("mlp.router.expert_bias", {names.correction: (experts.count,)})
        found.append(replace(bias, buffer=True))
    if experts.shared_ffn:
        found += layer.network("mlp.shared_experts", names.shared, names.matrices, h, experts.shared_ffn)
    if experts.shared_gate:
        found.append(layer.weight("mlp.shared_experts.gate_weight", {f"{names.shared_gate}.weight": (1, h)}))
    for i in range(experts.count):
        pattern = names.expert.replace("{expert}", str(i))
        found += layer.network("mlp.experts.experts", pattern, names.matrices, h, experts.ffn, expert=i)
    return found


# In the local layer spec the norms of a dense layer are separate modules, in Transformer Engine's they are part of the
# next linear layer.
_INPUT_NORM = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight"}
_DENSE_NORM = {"pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}


@dataclass(frozen=True)
class Place:
    """The part of the model that a rank's pipeline chunk holds."""

    layers: tuple[int, ...]
    """Numbers of its layers, from 0 over the model."""
    mixtures: frozenset[int] = frozenset()
    """Those of the model's layers that have experts."""
    first_expert: int = 0
    """Number of the rank's first expert in each of its layers."""

    def path(self, parameter: str) -> str:
        """Return the `Weight.path` of a parameter of the chunk, by its name in the chunk."""
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", parameter)
        if match is None:
            return parameter
        layer, name = self.layers[int(match[1])], match[2]
        norms = _INPUT_NORM if layer in self.mixtures else _INPUT_NORM | _DENSE_NORM
        return f"decoder.layers.{layer}.{norms.get(name, self._of_expert(name))}"

    def _of_expert(self, name: str) -> str:
        """Return a name with the expert's number over the whole layer; another name as it is."""
        for local in (
            r"mlp\.experts\.local_experts\.(?P<i>\d+)\.(?P<matrix>linear_fc\d)\.weight",  # SequentialMLP
            r"mlp\.experts\.(?P<matrix>linear_fc\d)\.weight(?P<i>\d+)",  # TEGroupedMLP
        ):
            if match := re.fullmatch(local, name):
                return f"mlp.experts.{self.first_expert + int(match['i'])}.{match['matrix']}.weight"
        return name


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
