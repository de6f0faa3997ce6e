"""A run as frozen dataclasses: what a recipe's YAML may say, its defaults, and reading it with key=value overrides.

Checks that need more than one field are in `checks`; the translation to Megatron's arguments is in `arguments`. No
torch here: a recipe is read and refused before anything slow or expensive starts.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bft_megatron import defaults
from bft_megatron.errors import UserError
from bft_megatron.recipe_sources import SourceSettings, source_settings
from bft_megatron.yaml_file import YamlFile


@dataclass(frozen=True)
class ObjectiveSettings:
    """`objective:`, what is minimised."""

    name: str = "bft"
    """`sft`, `dft`, `bft`, or a record of your own as `package.module:attribute`."""
    group_size: int = field(default_factory=defaults.group_size)
    """Supervised tokens in a confidence window; left out: BFT_GROUP_SIZE, or 256."""
    gamma: float = field(default_factory=defaults.gamma)
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
    kernels: Literal["torch", "triton"] = "torch"
    """Of the head's arithmetic on the vocabulary; `triton` on GPUs alone, and not measured on one."""


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


MAY_BE_NULL = {"lora"}
"""Groups of fields that may be left out as a whole."""

# Fields that people bring from other trainers and that would be wrong here, with the reason.
REFUSED_FIELDS = {
    "objective.label_smoothing": "with label smoothing exp(-loss) is no longer the model's probability of the label, "
    "of which the weights of bft and dft are made; leave it out",
}


def load(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe's YAML, apply `key=value` overrides, fill in the defaults.

    Raises:
        UserError: no such file, not YAML, an unknown key or a value of the wrong type, named by file, line and field.
    """
    path = Path(path)
    ObjectiveSettings()  # a bad environment variable is refused as such
    try:
        text = path.read_text()
    except OSError as e:
        raise UserError(f"cannot read the recipe: {e.strerror}", str(path)) from None
    source = YamlFile(path, text)
    layers = [(source.tree, None), *((_override(o), o) for o in overrides or [])]
    merged = OmegaConf.structured(Recipe)
    for tree, override in layers:
        for key in _leaf_keys(tree):
            if key in MAY_BE_NULL and OmegaConf.select(tree, key) is None:
                continue
            _refuse_unknown(key, override or source.where(key))
        try:
            merged = OmegaConf.merge(merged, tree)
        except OmegaConfBaseException as e:
            key = e.full_key or ""
            raise UserError(e.msg.splitlines()[0] if e.msg else str(e), override or source.where(key)) from None
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise UserError(f"{', '.join(missing)} must be given", str(path))
    return OmegaConf.to_object(merged)


def where(path: str | Path, overrides: list[str], field_name: str) -> str:
    """The place that gave a field its value: the last override that names it, else its line in the recipe's file."""
    for override in reversed(overrides):
        if override.partition("=")[0] == field_name:
            return override
    return YamlFile(Path(path), Path(path).read_text()).where(field_name)


def dump(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML that `load` reads back to the same recipe."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def _override(text: str) -> DictConfig:
    key, equals, _ = text.partition("=")
    if not equals or not key.strip():
        raise UserError("an override is written key=value, for example train.lr=1e-5", text)
    try:
        return OmegaConf.from_dotlist([text])
    except (yaml.YAMLError, OmegaConfBaseException) as e:
        raise UserError(f"cannot read the value: {str(e).splitlines()[0]}", text) from None


def _leaf_keys(tree: DictConfig, prefix: str = "") -> list[str]:
    """Dotted keys of a tree, down to what is not a mapping; `megatron` is left whole, its keys are Megatron's."""
    keys = []
    for name in tree:
        value = tree._get_node(name)
        if isinstance(value, DictConfig) and f"{prefix}{name}" != "megatron" and not value._is_none():
            keys += _leaf_keys(value, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def _refuse_unknown(key: str, where: str) -> None:
    if key in REFUSED_FIELDS:
        raise UserError(REFUSED_FIELDS[key], where)
    schema: Any = Recipe
    for i, name in enumerate(parts := key.split(".")):
        known = {f.name for f in fields(schema)}
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = (
                f"; did you mean `{'.'.join([*parts[:i], *close])}`?"
                if close
                else f"; known here: {', '.join(sorted(known))}"
            )
            raise UserError(f"unknown field{hint}", where)
        declared = get_type_hints(schema)[name]
        schema = next((t for t in get_args(declared) if is_dataclass(t)), declared)  # `Group | None` is a group
        if not is_dataclass(schema):
            if schema is not dict and i + 1 < len(parts) and name != "megatron":
                raise UserError(f"`{'.'.join(parts[: i + 1])}` takes a value, not fields", where)
            return
    raise UserError(f"`{key}` is a group of fields; known here: {', '.join(f.name for f in fields(schema))}", where)
