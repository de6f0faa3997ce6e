"""Reading the experts of a mixture from a model's `config.json`, one function an architecture.

Their number has no default: files of the hub and releases of transformers name it differently, and a model that was
read without it would be a dense one.
"""

from __future__ import annotations

from dataclasses import replace

from bft_megatron.hf.config_file import ConfigFile
from bft_megatron.hf.model_config import ExpertNames, Experts

MIXTRAL = ExpertNames("block_sparse_moe.gate", "block_sparse_moe.experts.{expert}.{matrix}", ("w1", "w3", "w2"))
HUNYUAN = ExpertNames("mlp.gate.wg", shared="mlp.shared_mlp.{matrix}")
GLM = ExpertNames(shared="mlp.shared_experts.{matrix}", correction="mlp.gate.e_score_correction_bias")


def checked(raw: ConfigFile, experts: Experts) -> Experts:
    """Return the experts of any architecture.

    Raises:
        UserError: a token cannot be sent to so many, or it is sent to one whose weight is always 1.
    """
    if experts.per_token > experts.count:
        raise raw.unsupported(f"{experts.per_token} experts a token of {experts.count}", "num_experts_per_tok")
    if experts.per_token == 1 and experts.scores == "softmax of chosen":
        raise raw.unsupported("one expert a token, whose weight is always 1", "norm_topk_prob")
    return experts


def qwen3_moe(raw: ConfigFile) -> Experts:
    """Return the experts of `Qwen3MoeForCausalLM`: no shared network, dense layers where the config says so."""
    return _qwen_moe(raw, per_token=8, ffn=768)


def qwen2_moe(raw: ConfigFile) -> Experts:
    """Return the experts of `Qwen2MoeForCausalLM`: as Qwen3's, with a gated shared network."""
    if not raw.get("qkv_bias", True):
        raise raw.unsupported("query, key and value without a bias", "qkv_bias")
    return _qwen_moe(raw, per_token=4, ffn=1408, shared=5632)


def qwen3_next(raw: ConfigFile) -> Experts:
    """Return the experts of `Qwen3NextForCausalLM`: as Qwen3's, with a gated shared network."""
    return _qwen_moe(raw, per_token=10, ffn=512, shared=512, divided=True)


def qwen3_5_moe(raw: ConfigFile) -> Experts:
    """Return the experts of Qwen3.5: as Qwen3-Next's, in every layer."""
    own = _qwen_moe(raw, per_token=8, ffn=512, shared=512, divided=True)
    return replace(own, scores="softmax of chosen", dense_layers=())


def _qwen_moe(raw: ConfigFile, *, per_token: int, ffn: int, shared: int = 0, divided: bool = False) -> Experts:
    """Return Qwen's experts, by the class's defaults.

    Args:
        shared: default width of the gated shared network; 0: the class has none.
        divided: whether weights are divided by the sum of the chosen.
    """
    return Experts(
        count=raw.any_of("num_experts", "num_local_experts"),
        per_token=raw.integer("num_experts_per_tok", per_token),
        ffn=raw.integer("moe_intermediate_size", ffn),
        scores="softmax of chosen" if raw.get("norm_topk_prob", divided) else "softmax of all",
        dense_layers=_qwen_dense_layers(raw),
        shared_ffn=raw.integer("shared_expert_intermediate_size", shared) if shared else 0,
        shared_gate=bool(shared),
    )


def mixtral(raw: ConfigFile) -> Experts:
    """Return the experts of `MixtralForCausalLM`, as wide as a dense model's network."""
    return Experts(
        count=raw.any_of("num_local_experts", "num_experts"),
        per_token=raw.integer("num_experts_per_tok", 2),
        ffn=raw.integer("intermediate_size"),
        scores="softmax of chosen",
        names=MIXTRAL,
    )


def hunyuan(raw: ConfigFile) -> Experts:
    """Return the experts of `HunYuanMoEV1ForCausalLM`, with a shared network as wide as each of them.

    Files of the hub have keys that transformers does not read, with lists that have an entry for each layer.
    """
    for key, value in {"use_mixed_mlp_moe": True, "use_qk_norm": True, "norm_topk_prob": True}.items():
        if raw.get(key, value) != value:
            raise raw.unsupported(f"{key} {raw.get(key, value)}, which transformers does not read", key)
    for key in ("use_cla", "use_mla", "group_limited_greedy", "moe_layer_num_skipped"):
        if raw.get(key, 0):
            raise raw.unsupported(f"{key} {raw.get(key, 0)}, which transformers does not read", key)
    ffn = raw.integer("intermediate_size")
    for key, one in {"moe_intermediate_size": ffn, "num_shared_expert": 1}.items():
        if raw.same_in_all_layers(key, one) != one:
            raise raw.unsupported(f"another value than {one}, which transformers has", key)
    return Experts(
        count=raw.any_of("num_experts", "num_local_experts"),
        per_token=raw.any_of("moe_topk", "num_experts_per_tok"),
        ffn=ffn,
        scores="softmax of chosen",
        shared_ffn=ffn,
        names=HUNYUAN,
    )


def glm4_moe(raw: ConfigFile) -> Experts:
    """Return the experts of `Glm4MoeForCausalLM`: sigmoid scores with a correction, dense first layers, groups."""
    per_token, width = raw.integer("num_experts_per_tok", 8), raw.integer("moe_intermediate_size", 1408)
    if not raw.get("norm_topk_prob", True):
        raise raw.unsupported("sigmoid scores that are not divided by their sum", "norm_topk_prob")
    if per_token == 1:
        raise raw.unsupported("sigmoid scores of one expert a token, divided by themselves", "num_experts_per_tok")
    count = raw.any_of("n_routed_experts", "num_local_experts")
    groups, chosen = _groups(raw, count, per_token)
    return Experts(
        count=count,
        per_token=per_token,
        ffn=width,
        scores="sigmoid",
        scale=raw.number("routed_scaling_factor", 1.0),
        groups=groups,
        groups_per_token=chosen,
        dense_layers=tuple(range(raw.integer("first_k_dense_replace", 1, least=0))),
        shared_ffn=raw.integer("n_shared_experts", 1) * width,
        names=GLM,
    )


def _groups(raw: ConfigFile, count: int, per_token: int) -> tuple[int, int]:
    """Return the number of groups and of those a token's experts are in; where all are, there are no groups."""
    groups, chosen = raw.integer("n_group", 1), raw.integer("topk_group", 1)
    if count % groups:
        raise raw.unsupported(f"{groups} groups of {count} experts", "n_group")
    if chosen >= groups:
        return 1, 1
    if per_token // chosen != 2:  # Megatron scores a group by its best so many experts, transformers by its best two
        raise raw.unsupported(f"{per_token} experts a token from {chosen} groups (twice as many are)", "n_group")
    return groups, chosen


def _qwen_dense_layers(raw: ConfigFile) -> tuple[int, ...]:
    step, listed = raw.integer("decoder_sparse_step", 1), raw.get("mlp_only_layers", [])
    layers = range(raw.integer("num_hidden_layers"))
    return tuple(i for i in layers if i in listed or (i + 1) % step)
