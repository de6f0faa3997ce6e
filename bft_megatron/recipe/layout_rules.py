"""Checks of a recipe's layout against the model's sizes, the length of a row, the batch and the number of processes."""

from __future__ import annotations

from typing import Protocol

from bft_megatron.errors import FieldError
from bft_megatron.recipe.schema import Recipe


class ModelShape(Protocol):
    """The sizes of a model that the checks need; `hf.architectures.ModelConfig` provides them."""

    @property
    def layers(self) -> int:
        """Number of transformer layers."""

    @property
    def heads(self) -> int:
        """Number of attention heads."""

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""

    @property
    def ffn(self) -> int:
        """Width of the feed-forward layer."""

    @property
    def max_positions(self) -> int:
        """Longest sequence that the model supports, in tokens."""

    @property
    def has_vision(self) -> bool:
        """Whether the model's files have a vision part beside the decoder."""

    @property
    def experts(self) -> ExpertShape | None:
        """The experts of a mixture; None: a dense model."""

    @property
    def linear_attention(self) -> LinearAttentionShape | None:
        """The gated delta nets of a hybrid; None: every layer has attention."""


class LinearAttentionShape(Protocol):
    """The sizes of gated delta nets that the checks need; `hf.model_config.LinearAttention` provides them."""

    @property
    def key_heads(self) -> int:
        """Number of key heads, a divisor of that of value heads."""

    @property
    def joined_by_head(self) -> bool:
        """Whether the files join the projections by key head."""


class ExpertShape(Protocol):
    """The sizes of a mixture that the checks need; `hf.model_config.Experts` provides them."""

    @property
    def count(self) -> int:
        """Number of experts of a layer."""

    @property
    def ffn(self) -> int:
        """Width of an expert's feed-forward network."""

    @property
    def shared_ffn(self) -> int:
        """Width of the network that every token goes through besides, or 0."""

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Layers without experts."""


def check_layout(recipe: Recipe, model: ModelShape) -> None:
    """Raise FieldError if the parallel sizes contradict each other, or do not divide the model's sizes or the rows."""
    _check_sizes(recipe)
    _check_model(recipe, model)
    _check_experts(recipe, model.experts)
    if model.linear_attention is not None:
        _check_linear_attention(recipe, model.linear_attention)
    _check_row_length(recipe, model)


def check_world(recipe: Recipe, world_size: int) -> None:
    """Raise FieldError if the number of processes does not fit the layout, or the batch does not divide over them."""
    parallel, train = recipe.parallel, recipe.train
    one_copy = parallel.model_parallel_size
    if world_size % one_copy:
        raise FieldError(
            "parallel",
            f"tensor x pipeline x context = {one_copy} processes hold the model once; {world_size} is not a multiple",
        )
    if world_size % (experts := parallel.expert_model_parallel_size):
        raise FieldError(
            "parallel.expert",
            f"expert x expert_tensor x pipeline = {experts} processes hold the experts once; {world_size} is not a "
            "multiple",
        )
    instances = recipe.megatron.get("num-distributed-optimizer-instances", 1)
    if (
        experts > parallel.pipeline
        and isinstance(instances, int)
        and instances > 1
        and world_size // experts % instances
    ):
        raise FieldError(
            "megatron.num-distributed-optimizer-instances",
            f"{instances} does not divide the {world_size // experts} processes that share an expert",
        )
    step_rows = world_size // one_copy * train.micro_batch_size
    if train.global_batch_size % step_rows:
        raise FieldError(
            "train.global_batch_size",
            f"{train.global_batch_size} is not a multiple of micro_batch_size x data-parallel size = {step_rows}",
        )
    if parallel.virtual_pipeline > 1 and train.global_batch_size // step_rows % parallel.pipeline:
        raise FieldError(
            "train.global_batch_size",
            f"gives {train.global_batch_size // step_rows} micro-batches a step; with virtual_pipeline they must be a "
            f"multiple of parallel.pipeline ({parallel.pipeline})",
        )


UNEVEN_SPLIT_FLAGS = {
    "account-for-embedding-in-pipeline-split",
    "account-for-loss-in-pipeline-split",
    "decoder-first-pipeline-num-layers",
    "decoder-last-pipeline-num-layers",
    "pipeline-model-parallel-layout",
}
"""Flags under `megatron` with which pipeline stages may hold different numbers of layers."""


def pad_multiple(recipe: Recipe) -> int:
    """Return the number of tokens to a multiple of which packed samples are padded.

    Its default is 2 x context, because context parallelism cuts every sample into that many chunks; 1 without it.
    """
    return recipe.data.pad_multiple or recipe.parallel.context_chunks


def _check_sizes(recipe: Recipe) -> None:
    parallel = recipe.parallel
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise FieldError("parallel.virtual_pipeline", "needs parallel.pipeline above 1")
    if parallel.sequence_parallel and parallel.tensor == 1:
        raise FieldError("parallel.sequence", "sequence parallelism shards over tensor ranks: parallel.tensor is 1")


def _check_model(recipe: Recipe, model: ModelShape) -> None:
    parallel, experts = recipe.parallel, model.experts
    dense = experts is None or experts.dense_layers
    for count, what in (
        (model.heads, "attention heads"),
        (model.kv_heads, "key/value heads"),
        (model.ffn if dense else 0, "feed-forward columns"),
        (experts.shared_ffn if experts else 0, "feed-forward columns of shared experts"),
    ):
        if count % parallel.tensor:
            raise FieldError("parallel.tensor", f"{parallel.tensor} does not divide the model's {count} {what}")
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if model.layers % chunks and not UNEVEN_SPLIT_FLAGS & recipe.megatron.keys():
        raise FieldError(
            "parallel.pipeline",
            f"pipeline x virtual_pipeline = {chunks} does not divide the model's {model.layers} layers; for an uneven "
            "split set `account-for-embedding-in-pipeline-split` or `decoder-first-pipeline-num-layers` under "
            "`megatron`",
        )


def _check_experts(recipe: Recipe, experts: ExpertShape | None) -> None:
    parallel = recipe.parallel
    if experts is None:
        for name in ("expert", "expert_tensor"):
            if getattr(parallel, name) > 1:
                raise FieldError(f"parallel.{name}", "the model has no experts: leave it out")
        if moe := sorted(flag for flag in recipe.megatron if flag.startswith("moe-")):
            raise FieldError(f"megatron.{moe[0]}", "the model has no experts: leave it out")
        return
    if experts.count % parallel.expert:
        raise FieldError("parallel.expert", f"{parallel.expert} does not divide the model's {experts.count} experts")
    if experts.ffn % parallel.expert_tensor:
        what = f"the {experts.ffn} feed-forward columns of an expert"
        raise FieldError("parallel.expert_tensor", f"{parallel.expert_tensor} does not divide {what}")
    if parallel.tensor > 1 and not parallel.sequence_parallel:
        raise FieldError("parallel.sequence", "a model with experts and parallel.tensor above 1 needs it: leave it out")


def _check_linear_attention(recipe: Recipe, net: LinearAttentionShape) -> None:
    tensor, context = recipe.parallel.tensor, recipe.parallel.context
    what = f"does not divide the {net.key_heads} key heads of the model's gated delta nets"
    if net.key_heads % tensor:
        raise FieldError("parallel.tensor", f"{tensor} {what}")
    if net.key_heads % (tensor * context):
        raise FieldError("parallel.context", f"tensor x context = {tensor * context} {what}: each rank computes some")
    _check_flags_of_linear_attention(recipe)


def _check_flags_of_linear_attention(recipe: Recipe) -> None:
    """Refuse flags with which the first step would fail, or which nobody has tried with these layers."""
    flags = recipe.megatron
    if flags.get("deterministic-mode") and recipe.data.packing:
        raise FieldError(
            "megatron.deterministic-mode",
            "gated delta nets then take no packed rows: leave it out, or set data.packing to false",
        )
    if recomputes_head_norm(recipe) and (recipe.device == "cpu" or recipe.layers == "torch"):
        raise FieldError("megatron.recompute-modules", HEAD_NORM_NEEDS)
    for flag in ("tp-comm-overlap", "use-precision-aware-optimizer", "optimizer-cpu-offload"):
        if flags.get(flag):
            raise FieldError(f"megatron.{flag}", "not shown to be right with gated delta nets: leave it out")


HEAD_NORM_NEEDS = (
    "gdn_norm_out needs a GPU and Transformer Engine's layers: leave it out, or set recompute-granularity to full"
)


def recomputes_head_norm(recipe: Recipe) -> bool:
    """Return whether the norm of gated delta nets' outputs is recomputed by itself, which Transformer Engine does."""
    return "gdn_norm_out" in (recipe.megatron.get("recompute-modules") or ())


def _check_row_length(recipe: Recipe, model: ModelShape) -> None:
    parallel, data = recipe.parallel, recipe.data
    if data.seq_length > model.max_positions:
        raise FieldError("data.seq_length", f"the model was made for at most {model.max_positions} positions")
    chunks = parallel.context_chunks
    if pad_multiple(recipe) % chunks:
        raise FieldError("data.pad_multiple", f"must be a multiple of 2 x parallel.context = {chunks}")
    shards = chunks * (parallel.tensor if parallel.sequence_parallel else 1)
    for need, why in (
        (shards, "what context and sequence parallelism cut it into"),
        (pad_multiple(recipe), "data.pad_multiple"),
    ):
        if data.seq_length % need:
            raise FieldError("data.seq_length", f"{data.seq_length} is not a multiple of {need}, {why}")
