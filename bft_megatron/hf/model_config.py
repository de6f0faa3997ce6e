"""The sizes and options of a decoder and of its experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

VISION = "model.visual."
"""Beginning of the names of the tensors of a vision part."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's sizes and options, read from `config.json` by `read_config`."""

    architecture: str
    """Class name in transformers, such as `LlamaForCausalLM`."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab_size: int
    """Rows of the embedding in the files; Megatron's own embedding is padded."""
    tied: bool
    """Whether the output layer shares the embedding's weight."""
    rope_theta: float
    rope_factor: float | None
    """Factor of Llama 3's rotary frequency scaling; None: no scaling."""
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool
    """Whether query and key are normalised per head."""
    window: int | None
    """Sliding window: number of tokens that a token attends to, itself included; None: full causal attention."""
    max_positions: int
    initializer_range: float
    dtype: str | None
    """Dtype of the files as the config names it, such as `bfloat16`."""
    norm_after_rotary: bool = False
    """Whether query and key are normalised after the rotary embedding in place of before it."""
    rotary_part: float = 1.0
    """Part of each head, its first elements, that has the rotary embedding."""
    prediction_layers: int = 0
    """Layers for multi-token prediction that config.json announces in its files, which are not trained."""
    experts: Experts | None = None
    """The experts of a mixture; None: a dense model."""
    linear_attention: LinearAttention | None = None
    """The gated delta nets that some layers have in place of attention; None: every layer has attention."""
    output_gate: bool = False
    """Whether the attention's output is multiplied by the sigmoid of a gate, which is projected beside the query."""
    zero_centred_norms: bool = False
    """Whether norms multiply by 1 + weight; that of a gated delta net's output does not."""
    prefix: str = "model."
    """Beginning of the names of the decoder's tensors in the files."""
    carried: tuple[str, ...] = ()
    """Beginnings of the names of other tensors in the files, which are not trained."""

    @property
    def has_vision(self) -> bool:
        """Return whether the files have a vision part beside the decoder."""
        return VISION in self.carried

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer, numbered from 0, has experts in place of one feed-forward network."""
        return self.experts is not None and layer not in self.experts.dense_layers

    def has_linear_attention(self, layer: int) -> bool:
        """Return whether a layer, numbered from 0, has a gated delta net in place of attention."""
        return self.linear_attention is not None and layer in self.linear_attention.layers


@dataclass(frozen=True)
class LinearAttention:
    """A gated delta net: linear attention whose state decays and forgets what a key had stored before."""

    layers: tuple[int, ...]
    """The layers, numbered from 0, that have one."""
    key_heads: int
    value_heads: int
    """A multiple of the key heads, each of which several value heads share."""
    key_dim: int
    value_dim: int
    """Size of a head."""
    taps: int
    """Tokens that the convolution before it sees, the token itself included."""
    joined_by_head: bool = False
    """Whether the files join the projections, with the rows of a key head and of its value heads together."""


@dataclass(frozen=True)
class ExpertNames:
    """Hugging Face names of a layer's tensors, without `model.layers.N.` and `.weight`."""

    router: str = "mlp.gate"
    expert: str = "mlp.experts.{expert}.{matrix}"
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = "mlp.shared_expert.{matrix}"
    shared_gate: str = "mlp.shared_expert_gate"
    correction: str = ""
    """Name of the bias that is added to the scores for the choice alone; empty: there is none."""
    joined: bool = False
    """Whether all experts of a layer are the two tensors `mlp.experts.gate_up_proj` and `mlp.experts.down_proj`."""


@dataclass(frozen=True)
class Experts:
    """The experts of a layer and the router that sends each token to some of them."""

    count: int
    """Experts of a layer."""
    per_token: int
    """Experts that a token is sent to."""
    ffn: int
    """Width of an expert's feed-forward network."""
    scores: Literal["softmax of chosen", "softmax of all", "sigmoid"]
    """Weights of the chosen experts: a softmax over their logits alone, their part of the softmax over all, or their
    sigmoids divided by the sum of these."""
    scale: float = 1.0
    """Factor of the weights."""
    groups: int = 1
    """Groups of neighbouring experts, scored by their two best experts."""
    groups_per_token: int = 1
    """Groups that a token's experts are chosen from."""
    dense_layers: tuple[int, ...] = ()
    """Layers, numbered from 0, that have one feed-forward network of width `ffn` of the model."""
    shared_ffn: int = 0
    """Width of the network that every token goes through besides; 0: there is none."""
    shared_gate: bool = False
    """Whether the shared network's output is scaled by a learned gate of each token."""
    names: ExpertNames = ExpertNames()
