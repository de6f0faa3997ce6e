"""The recipe's schema: one frozen dataclass for each group of fields, with its default and a line on its meaning.

Reading a recipe's YAML is in `reader`, checks of several fields in `rules`. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from bft_megatron.recipe import environment
from bft_megatron.recipe.sources import SourceSettings, source_settings


@dataclass(frozen=True)
class ObjectiveSettings:
    """`objective:`, what is minimised."""

    name: str = "bft"
    """`sft`, `dft`, `bft`, or a record of your own as `package.module:attribute`."""
    group_size: int = field(default_factory=environment.group_size)
    """Supervised tokens in a confidence window; left out: BFT_GROUP_SIZE, or 256."""
    gamma: float = field(default_factory=environment.gamma)
    """Exponent of the confidence in the sample weight 1 - c^gamma; left out: BFT_CONF_GAMMA, or 1."""
    confidence: Literal["geometric", "arithmetic"] = "geometric"
    """Window means of log p (the authors' code) or of p (their prose)."""
    reduce: Literal["tokens", "samples"] | None = None
    """What the loss is averaged over; left out: the objective's own (`tokens` for sft and dft, `samples` for bft)."""
    cp_windows: Literal["per_rank", "exact"] = "per_rank"
    """Under context parallelism: windows within a rank's contiguous chunks, or those of one process."""
    head: Literal["auto", "logits", "chunked"] = "auto"
    """With the logits, or a tile at a time without them; `auto`: without where they would take over 1 GiB on a rank."""
    chunk_size: int = 8192
    """Tokens of a tile of the chunked head."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Kernels of the head's arithmetic on the vocabulary; `auto`: Triton's on GPUs on which they are tested."""


@dataclass(frozen=True)
class DataSettings:
    """`data:`, which conversations, and how they become rows."""

    train: Any
    """A path, or a list of sources, each a path or the fields of `SourceSettings`."""
    valid: Any = None
    """Held-out sources, as in `train`, read whole at every validation."""
    on_error: Literal["stop", "skip"] = "stop"
    """What happens at a row that is no conversation; `skip` counts and lists it."""
    seq_length: int = 4096
    """Tokens in a row."""
    packing: bool = True
    """Many samples a row; `false`: one sample a row, padded."""
    pad_multiple: int | None = None
    """Tokens that a packed sample is padded to a multiple of; left out: 2 x context, or 1 where context is 1."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What happens to samples longer than a row; both are counted."""
    supervise: Literal["assistant", "last", "all"] = "assistant"
    """Which turns are learned: all of the assistant's, its last one, or every token."""
    turns: Literal["joined", "split"] = "joined"
    """`split`: a sample for each of the assistant's turns, which ends with that turn and learns it alone."""
    chat_template: str | None = None
    """Jinja file, or the name of one of the tokenizer's templates; left out: the tokenizer's own."""

    def sources(self, field_name: Literal["train", "valid"]) -> tuple[SourceSettings, ...]:
        """The items of `train` or `valid`; none where `valid` is left out.

        Raises:
            FieldError: what is wrong with which item.
        """
        value = getattr(self, field_name)
        return () if value is None else source_settings(value, f"data.{field_name}")

    @property
    def most_sources(self) -> int:
        """Sources of `train` or of `valid`, whichever has more: what a step's report has room for."""
        return max(len(self.sources("train")), len(self.sources("valid")))


@dataclass(frozen=True)
class ParallelSettings:
    """`parallel:`, the layout."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    """Model chunks a pipeline rank holds (interleaved schedule above 1)."""
    context: int = 1
    data: int = 1
    """Data-parallel size of a run on the CPU; elsewhere the number of GPUs decides."""
    sequence: bool | None = None
    """Sequence parallelism; left out: on where tensor is above 1."""


@dataclass(frozen=True)
class TrainSettings:
    """`train:`, the schedule and the optimizer (AdamW)."""

    global_batch_size: int = 32
    """Rows a step."""
    micro_batch_size: int = 1
    """Rows a forward pass; always 1 when packing."""
    iterations: int | None = None
    """Steps; give this or `epochs`."""
    epochs: float | None = None
    lr: float = 5.0e-6
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    warmup_iterations: int = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1.0e-8
    clip_grad: float = 1.0
    seed: int = 1234
    """Of the data order, dropout and `init: random`."""
    precision: Literal["bf16", "fp32"] = "bf16"
    save_every: int | None = None
    """Steps between checkpoints; left out: one, at the end."""
    validate_every: int | None = None
    """Steps between validations; left out: before the first step and after the last."""
    exit_after: float | None = None
    """Minutes from the start of the process by which it has saved and ended; the same command goes on."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_best: int = 0
    """Checkpoints that are kept besides: the best by `best_metric` of the validation at their step."""
    best_metric: Literal["loss", "lm_loss", "mean_p", "accuracy"] | None = None
    """Left out: `lm_loss` for sft, `mean_p` for the others, whose loss is not what they descend."""
    save_hf: bool = False
    """Write every kept checkpoint as a Hugging Face model too."""
    max_skipped: int = 10
    """Steps in a row with a gradient that is not finite, each of them skipped, after which the run gives up."""


LORA_TARGETS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


@dataclass(frozen=True)
class LoraSettings:
    """`lora:`, low-rank adapters in place of the weights themselves."""

    rank: int = 16
    alpha: float = 32.0
    """An adapter's product is scaled by alpha / rank."""
    dropout: float = 0.0
    """On the adapters' input; nothing but 0 is the same on every layout, and nothing but 0 is taken."""
    target: Any = "all"
    """`all`, `attention`, `mlp`, or a list of Hugging Face's module names, `[q_proj, v_proj]`."""
    adapter: str | None = None
    """PEFT folder to start from; left out: an adapter that changes nothing yet."""

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules with an adapter, by the last part of Hugging Face's names; what is unknown stays in it."""
        everything = tuple(name for names in LORA_TARGETS.values() for name in names)
        groups = {"all": everything, **LORA_TARGETS}
        if isinstance(self.target, str):
            return groups.get(self.target, (self.target,))
        return tuple(self.target) if isinstance(self.target, list | tuple) else (str(self.target),)


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    model: str
    """Hugging Face folder (or the id of a model in the local hub cache): architecture, weights, tokenizer, template."""
    data: DataSettings
    output: str
    """Folder of the run: metrics, checkpoints, logs, packed data."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` draws the weights anew, the same on every layout."""
    device: Literal["auto", "cpu"] = "auto"
    lora: LoraSettings | None = None
    """Left out: every weight is trained."""
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    megatron: dict[str, Any] = field(default_factory=dict)
    """Megatron-LM's own flags by name: `recompute-granularity: selective`, `overlap-grad-reduce: true`."""
