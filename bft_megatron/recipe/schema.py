"""The recipe's schema: a frozen dataclass for each group of fields, with every field's default, limits and meaning.

`reader` reads a recipe's YAML and holds each value to its limits, `rules` checks fields against each other. Imports no
torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from bft_megatron.recipe import environment
from bft_megatron.recipe.limits import PATH, count, limited, number
from bft_megatron.recipe.sources import SourceSettings, source_settings


@dataclass(frozen=True)
class ObjectiveSettings:
    """`objective:`, the function being minimised."""

    name: str = "bft"
    """`sft`, `dft`, `bft`, one of the [family](objectives.md#the-family), or your own as `package.module:attribute`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the objective, by the names of its function's arguments, such as `{alpha: 0.5}` for `power`."""
    group_size: int = limited(environment.GROUP_SIZE, default_factory=environment.group_size)
    """Supervised tokens in a confidence window. Left out: the environment variable BFT_GROUP_SIZE, else 256."""
    gamma: float = limited(environment.GAMMA, default_factory=environment.gamma)
    """Exponent of the confidence in the sample weight 1 - c^gamma. Left out: BFT_CONF_GAMMA, else 1."""
    confidence: Literal["geometric", "arithmetic"] = "geometric"
    """`geometric` averages log p over a window (the BFT authors' code), `arithmetic` averages p (their README)."""
    reduce: Literal["tokens", "samples"] | None = None
    """A mean over supervised tokens or over samples. Left out: `tokens` for sft and dft, `samples` for bft."""
    cp_windows: Literal["per_rank", "exact"] = "per_rank"
    """Confidence windows under context parallelism: within a rank's chunks, or exactly those of one process."""
    head: Literal["auto", "logits", "chunked"] = "auto"
    """`chunked` computes the logits a tile at a time; `auto` does so if all would take over 1 GiB on a rank."""
    chunk_size: int = count(8192)
    """Tokens of a tile of the chunked head."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Kernels of the head's arithmetic on the vocabulary; `auto`: Triton's on GPUs on which they are tested."""


@dataclass(frozen=True)
class DataSettings:
    """`data:`, the conversations, and how they become rows."""

    train: Any
    """A path, a source, or a list of both."""
    valid: Any = None
    """Held-out sources, written like `train`. Every validation reads all of them. Left out: no validation."""
    on_error: Literal["stop", "skip"] = "stop"
    """A row that is not a conversation stops the run, or is skipped, counted and listed."""
    max_row_bytes: int = count(8388608)
    """A longer row is refused unread: its memory is hundreds of times its text. 8 MiB are some two million tokens."""
    seq_length: int = count(4096)
    """Tokens in a row, the unit of a batch."""
    packing: bool = True
    """Packs many samples into a row; none sees another. `false`: one sample a row, padded."""
    pad_multiple: int | None = count(None)
    """Packed samples are padded to a multiple of this many tokens. Left out: 2 x context, or 1 if context is 1."""
    overlong: Literal["drop", "truncate"] = "drop"
    """Samples longer than a row are dropped or truncated, and counted."""
    supervise: Literal["assistant", "last", "all"] = "assistant"
    """The supervised tokens: all of the assistant's turns, its last turn, or every token."""
    turns: Literal["joined", "split"] = "joined"
    """`split` makes a sample of each assistant turn: it ends with that turn, and only that turn is supervised."""
    chat_template: str | None = field(default=None, metadata=PATH)
    """Jinja file, name of one of the tokenizer's templates, or a well-known one: `chatml`, `qwen`, `llama3`, `mistral`,
    `gemma`, `deepseek`, `deepseek3`, `glm`, `phi`, `phi4`. Left out: the tokenizer's default."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, such as `enable_thinking: false`; a row's own `chat_template_kwargs` override."""
    special_tokens: Any = None
    """Added tokens of the tokenizer that are tokens in messages too: a list, or `all`. Left out: they are text."""

    def sources(self, field_name: Literal["train", "valid"]) -> tuple[SourceSettings, ...]:
        """Return the sources of `train` or `valid`; none if `valid` is left out.

        Raises:
            FieldError: an item is invalid; the message names it and the fault.
        """
        value = getattr(self, field_name)
        return () if value is None else source_settings(value, f"data.{field_name}")

    @property
    def most_sources(self) -> int:
        """Number of sources of `train` or of `valid`, whichever has more; the meter keeps sums for that many."""
        return max(len(self.sources("train")), len(self.sources("valid")))


@dataclass(frozen=True)
class ParallelSettings:
    """`parallel:`, the layout."""

    tensor: int = count(1)
    """Tensor-parallel size: GPUs that share each layer's matrices. Must divide heads and key/value heads."""
    pipeline: int = count(1)
    """Pipeline-parallel size: GPUs that hold consecutive groups of layers."""
    virtual_pipeline: int = count(1)
    """Groups of layers on each pipeline rank; above 1 the pipeline schedule is interleaved."""
    context: int = count(1)
    """Context-parallel size: GPUs that share each row's tokens."""
    expert: int = count(1)
    """Expert-parallel size: ranks that share the experts of a layer, taken from those of the other sizes."""
    expert_tensor: int = count(1)
    """Tensor-parallel size of the experts: ranks that share each expert's matrices."""
    data: int = count(1)
    """Data-parallel size of a run on the CPU. On GPUs it follows from their number and the other sizes."""
    sequence: bool | None = None
    """Sequence parallelism: tensor ranks share the tokens between matrices. Left out: on if tensor is above 1."""

    @property
    def model_parallel_size(self) -> int:
        """Number of processes that hold the model once."""
        return self.tensor * self.pipeline * self.context

    @property
    def expert_model_parallel_size(self) -> int:
        """Number of processes that hold the experts once."""
        return self.expert * self.expert_tensor * self.pipeline

    @property
    def sequence_parallel(self) -> bool:
        """Whether sequence parallelism is on: `sequence`, or by default whether tensor parallelism is on."""
        return self.tensor > 1 if self.sequence is None else self.sequence

    @property
    def context_chunks(self) -> int:
        """Number of equal chunks into which context parallelism splits a sample."""
        return 2 * self.context if self.context > 1 else 1


@dataclass(frozen=True)
class TrainSettings:
    """`train:`, the schedule and the optimizer (AdamW)."""

    global_batch_size: int = count(32)
    """Rows in a step."""
    micro_batch_size: int = count(1)
    """Rows in a forward pass on one data-parallel rank; must be 1 with packing."""
    iterations: int | None = count(None, at_least=0)
    """Steps. Give either this or `epochs`; 0 converts the model and stops."""
    epochs: float | None = number(None, above=0, at_most=1_000_000)
    """Passes over the training data; fractions are allowed. Give either this or `iterations`."""
    lr: float = number(5.0e-6, above=0)
    """Peak learning rate."""
    min_lr: float = number(0.0, at_least=0)
    """Learning rate at the end of the cosine."""
    warmup_iterations: int = count(0, at_least=0)
    """Steps of linear warm-up from 0 to `lr`; a cosine to `min_lr` follows."""
    weight_decay: float = number(0.0, at_least=0)
    """AdamW's weight decay."""
    adam_beta1: float = number(0.9, at_least=0, below=1)
    """AdamW's decay of the first moment."""
    adam_beta2: float = number(0.95, at_least=0, below=1)
    """AdamW's decay of the second moment."""
    adam_eps: float = number(1.0e-8, at_least=1e-37)  # below, it would be 0 in fp32
    """AdamW's epsilon."""
    clip_grad: float = number(1.0, at_least=0)
    """The gradient is scaled down to this norm; 0 turns clipping off."""
    seed: int = count(1234, at_least=0)
    """Seed of the data order and of `init: random`."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Data type of weights and activations; the optimizer keeps fp32 master weights under `bf16`."""
    save_every: int | None = count(None)
    """Steps between checkpoints. Left out: one checkpoint, at the end."""
    validate_every: int | None = count(None)
    """Steps between validations. Left out: after the last step. One always runs before the first step."""
    exit_after: float | None = number(None, above=0)
    """Minutes after the start by which the run has saved and ended; the same command resumes it."""
    keep_last: int = count(2)
    """Number of newest checkpoints to keep."""
    keep_best: int = count(0, at_least=0)
    """Number of best checkpoints to keep besides, by `best_metric` of the validation at their step."""
    best_metric: Literal["loss", "lm_loss", "mean_p", "accuracy"] | None = None
    """Validation metric of `keep_best`. Left out: `lm_loss` for sft, `mean_p` for every other objective."""
    save_hf: bool = False
    """Also writes every kept checkpoint as a Hugging Face model, in `hf/`, by a process beside the run."""
    max_skipped: int = count(10)
    """Steps with a non-finite gradient are skipped; after this many in a row the run gives up."""


DELTA_NET_INPUTS = {
    False: ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    True: ("in_proj_qkvz", "in_proj_ba"),
}
"""Projections into a gated delta net, by whether the model's files join them by key head."""

LORA_TARGETS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "linear_attention": (*DELTA_NET_INPUTS[False], *DELTA_NET_INPUTS[True], "out_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
"""Group of modules -> the Hugging Face names of its modules."""


@dataclass(frozen=True)
class LoraSettings:
    """`lora:`, low-rank adapters in place of the weights themselves."""

    rank: int = count(16)
    """Rank of the adapters."""
    alpha: float = number(32.0, above=0)
    """An adapter's output is scaled by alpha / rank."""
    dropout: float = number(0.0, at_least=0, below=1)
    """Must be 0: dropout in the adapters would make a run depend on its layout."""
    target: Any = "all"
    """`all`, `attention`, `linear_attention`, `mlp`, or a list of Hugging Face module names such as `[q_proj, v_proj]`.
    `attention` is full attention alone; `linear_attention` is the projections of gated delta nets, whose convolution
    has no adapter. In a mixture `mlp` is the dense layers' networks, the shared ones and, by `experts`, the experts; a
    router has no adapter."""
    experts: bool = True
    """Whether `gate_proj` and the like are also those of a mixture's experts, each with adapters of its own."""
    adapter: str | None = field(default=None, metadata=PATH)
    """PEFT folder to start from. Left out: fresh adapters, which do not change the model's output."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules with an adapter, by the last part of their Hugging Face names. Unknown names stay in, for `rules`."""
        everything = tuple(name for names in LORA_TARGETS.values() for name in names)
        groups = {"all": everything, **LORA_TARGETS}
        if isinstance(self.target, str):
            return groups.get(self.target, (self.target,))
        return tuple(self.target) if isinstance(self.target, list | tuple) else (str(self.target),)


@dataclass(frozen=True)
class MoeSettings:
    """`moe:`, the routers of a mixture of experts."""

    balance: float = number(0.0, at_least=0)
    """Coefficient of the loss that evens out how many tokens of a row each expert gets; 0 leaves it out."""
    z_loss: float = number(0.0, at_least=0)
    """Coefficient of the loss that keeps the routers' logits small; 0 leaves it out."""
    freeze_router: bool = False
    """Leaves the routers as they are: their weights have no gradient and no optimizer state."""


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    model: str = field(metadata=PATH)
    """Hugging Face folder, id of a model in the local hub cache, folder of an earlier run, or a Megatron checkpoint."""
    data: DataSettings
    """Training and validation data."""
    output: str = field(metadata=PATH)
    """Folder of the run: metrics, checkpoints, logs, packed data."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` draws new weights, the same on every layout."""
    device: Literal["auto", "cpu"] = "auto"
    """`auto` uses the machine's GPUs, or the CPU if there is none; `cpu` leaves the GPUs alone."""
    layers: Literal["auto", "torch", "transformer_engine"] = "auto"
    """The layers' kernels on a GPU: `auto` takes Transformer Engine's where it is installed, else torch's; `torch`
    never does; `transformer_engine` refuses to start without it."""
    lora: LoraSettings | None = None
    """Low-rank adapters. Left out: the run trains every weight."""
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    """The function being minimised."""
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    """The layout on processes."""
    train: TrainSettings = field(default_factory=TrainSettings)
    """The schedule and the optimizer."""
    moe: MoeSettings = field(default_factory=MoeSettings)
    """The routers of a mixture of experts; a dense model has none."""
    megatron: dict[str, Any] = field(default_factory=dict)
    """Megatron-LM's own flags by name, such as `recompute-granularity: selective`; underscores are read as dashes."""
