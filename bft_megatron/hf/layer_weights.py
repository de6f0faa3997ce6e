"""The parameters of a layer: of its attention or gated delta net, and of its feed-forward network or experts."""

from __future__ import annotations

from dataclasses import replace

from bft_megatron.hf.model_config import Experts, LinearAttention, ModelConfig
from bft_megatron.hf.tensors import HFTensor, Rows, Weight, split


class _Layer:
    """A maker of the weights of one layer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        self.layer, self.at = layer, f"{config.prefix}layers.{layer}"

    def tensor(self, name: str, *shape: int) -> HFTensor:
        """Return a tensor of the files by its name in the layer."""
        return HFTensor(f"{self.at}.{name}", shape)

    def weight(self, name: str, *tensors: HFTensor, axis: int | None = None, blocks: int = 1) -> Weight:
        """Return a weight of the layer."""
        return Weight(name, self.layer, tensors, axis, blocks)

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
        fc1 = self.weight(f"{at}.linear_fc1.weight", self.tensor(gate, ffn, h), self.tensor(up, ffn, h), axis=0)
        fc2 = self.weight(f"{at}.linear_fc2.weight", self.tensor(down, h, ffn), axis=1)
        return [replace(weight, expert=expert) for weight in (fc1, fc2)]


def layer_weights(config: ModelConfig, number: int) -> list[Weight]:
    """Return the parameters of a layer, numbered from 0, in the order of the computation."""
    layer, h = _Layer(config, number), config.hidden
    found = _linear_attention(config, layer) if config.has_linear_attention(number) else _attention(config, layer)
    norm = layer.tensor("post_attention_layernorm.weight", h)
    if config.experts is not None and config.has_experts(number):
        # The norm is a module of its own in every spec.
        return [*found, layer.weight("pre_mlp_layernorm.weight", norm), *_mixture(config.experts, layer, h)]
    matrices = ("gate_proj", "up_proj", "down_proj")
    return [
        *found,
        layer.weight("mlp.linear_fc1.layer_norm_weight", norm),
        *layer.network("mlp", "mlp.{matrix}", matrices, h, config.ffn),
    ]


def _attention(config: ModelConfig, layer: _Layer) -> list[Weight]:
    h, d, groups = config.hidden, config.head_dim, config.kv_heads
    q, kv = config.heads * d, groups * d

    def qkv(kind: str, *columns: int) -> Weight:
        query = [layer.tensor(f"self_attn.q_proj.{kind}", q, *columns)]
        if config.output_gate:  # in the files each head has its query's rows, then its gate's
            both = layer.tensor(f"self_attn.q_proj.{kind}", 2 * q, *columns)
            query = split(both, q, q, blocks=config.heads)
        key, value = (layer.tensor(f"self_attn.{x}_proj.{kind}", kv, *columns) for x in "kv")
        return layer.weight(f"self_attention.linear_qkv.{kind}", *query, key, value, axis=0, blocks=groups)

    out = layer.tensor("self_attn.o_proj.weight", h, q)
    return [
        layer.weight("self_attention.linear_qkv.layer_norm_weight", layer.tensor("input_layernorm.weight", h)),
        qkv("weight", h),
        *([qkv("bias")] if config.qkv_bias else []),
        *(_query_and_key_norms(config, layer) if config.qk_norm else []),
        layer.weight("self_attention.linear_proj.weight", out, axis=1),
    ]


def _query_and_key_norms(config: ModelConfig, layer: _Layer) -> list[Weight]:
    """Return the norms of the heads; after the rotary embedding they are a part of the core attention."""
    at, names = "self_attention", {"q": "q_norm", "k": "k_norm"}
    if config.norm_after_rotary:
        at, names = "self_attention.core_attention", {"q": "query_layernorm", "k": "key_layernorm"}
    tensors = {x: layer.tensor(f"self_attn.{name}.weight", config.head_dim) for x, name in names.items()}
    return [layer.weight(f"{at}.{x}_layernorm.weight", tensor) for x, tensor in tensors.items()]


def _linear_attention(config: ModelConfig, layer: _Layer) -> list[Weight]:
    """Return the parameters of a gated delta net; the sections of its joined ones are each sharded over TP."""
    net, h = config.linear_attention, config.hidden
    assert net is not None, "only such layers are asked for"
    heads, value = net.value_heads, net.value_heads * net.value_dim
    qkv = (net.key_heads * net.key_dim, net.key_heads * net.key_dim, value)
    taps = split(layer.tensor("linear_attn.conv1d.weight", sum(qkv), 1, net.taps), *qkv)
    into = _projections(net, layer, h, qkv)
    joined = layer.weight("self_attention.in_proj.weight", *into, axis=0)
    conv = layer.weight("self_attention.conv1d.weight", *taps, axis=0)
    decay = layer.weight("self_attention.A_log", layer.tensor("linear_attn.A_log", heads), axis=0)
    norm = layer.weight("self_attention.out_norm.weight", layer.tensor("linear_attn.norm.weight", net.value_dim))
    return [
        layer.weight("self_attention.in_proj.layer_norm_weight", layer.tensor("input_layernorm.weight", h)),
        replace(joined, sections=("query", "key", "value", "z", "beta", "alpha")),
        replace(conv, sections=("query", "key", "value")),
        layer.weight("self_attention.dt_bias", layer.tensor("linear_attn.dt_bias", heads), axis=0),
        replace(decay, fp32=True),
        replace(norm, fp32=True),
        layer.weight("self_attention.out_proj.weight", layer.tensor("linear_attn.out_proj.weight", h, value), axis=1),
    ]


def _projections(net: LinearAttention, layer: _Layer, h: int, qkv: tuple[int, int, int]) -> list[HFTensor]:
    """Return query, key, value, gate, beta and alpha, as Megatron has them; the files join some."""
    value, heads = qkv[2], net.value_heads
    if net.joined_by_head:
        first = layer.tensor("linear_attn.in_proj_qkvz.weight", sum(qkv) + value, h)
        second = layer.tensor("linear_attn.in_proj_ba.weight", 2 * heads, h)
        return [
            *split(first, *qkv, value, blocks=net.key_heads),
            *split(second, heads, heads, blocks=net.key_heads),
        ]
    rows = {"z": value, "b": heads, "a": heads}
    return [
        *split(layer.tensor("linear_attn.in_proj_qkv.weight", sum(qkv), h), *qkv),
        *(layer.tensor(f"linear_attn.in_proj_{name}.weight", n, h) for name, n in rows.items()),
    ]


def _mixture(experts: Experts, layer: _Layer, h: int) -> list[Weight]:
    """Return a layer's router, shared network and experts."""
    names, found = experts.names, list[Weight]()
    found.append(layer.weight("mlp.router.weight", layer.tensor(f"{names.router}.weight", experts.count, h)))
    if names.correction:
        bias = layer.weight("mlp.router.expert_bias", layer.tensor(names.correction, experts.count))
        found.append(replace(bias, buffer=True, fp32=True))
    if experts.shared_ffn:
        found += layer.network("mlp.shared_experts", names.shared, names.matrices, h, experts.shared_ffn)
    if experts.shared_gate:
        gate = layer.tensor(f"{names.shared_gate}.weight", 1, h)
        found.append(layer.weight("mlp.shared_experts.gate_weight", gate))
    if names.joined:
        return [*found, *_joined_experts(experts, layer, h)]
    for i in range(experts.count):
        pattern = names.expert.replace("{expert}", str(i))
        found += layer.network("mlp.experts.experts", pattern, names.matrices, h, experts.ffn, expert=i)
    return found


def _joined_experts(experts: Experts, layer: _Layer, h: int) -> list[Weight]:
    """Return the experts of files in which all of a layer are two tensors."""
    n, f, at, found = experts.count, experts.ffn, f"{layer.at}.mlp.experts", list[Weight]()
    for i in range(n):
        gate, up = (HFTensor(f"{at}.gate_up_proj", (f, h), Rows((n, 2 * f, h), first=j * f, lead=i)) for j in (0, 1))
        out = HFTensor(f"{at}.down_proj", (h, f), Rows((n, h, f), lead=i))
        fc1 = layer.weight("mlp.experts.experts.linear_fc1.weight", gate, up, axis=0)
        fc2 = layer.weight("mlp.experts.experts.linear_fc2.weight", out, axis=1)
        found += [replace(fc1, expert=i), replace(fc2, expert=i)]
    return found
