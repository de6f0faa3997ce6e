"""Checks of a recipe that need more than one field: layout against model, batch and row length.

They run before any process starts and name the field to change. They catch early, and report in the recipe's terms,
settings that Megatron itself would refuse during start-up or in its first step.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Protocol

from bft_megatron import user_code
from bft_megatron.errors import FieldError, reading, shortened
from bft_megatron.recipe.limits import Range
from bft_megatron.recipe.schema import LORA_TARGETS, Recipe

TIME_OUT = "distributed-timeout-minutes"
TIME_OUT_MINUTES = Range(above=0, at_most=366 * 24 * 60)


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


def check_recipe(recipe: Recipe, model: ModelShape) -> None:
    """Raise FieldError if values are invalid, contradict each other, or do not divide the model's sizes."""
    _check_data(recipe)
    _check_objective(recipe)
    _check_schedule(recipe)
    _check_layout(recipe)
    _check_model(recipe, model)
    _check_row_length(recipe, model)
    _check_lora(recipe)
    _check_flags(recipe)


def check_comparable(recipe: Recipe) -> None:
    """Raise FieldError if the recipe's model cannot be compared with transformers."""
    if recipe.lora is not None and recipe.lora.adapter is not None:
        raise FieldError("lora.adapter", "the base model is what is compared: leave it out (lora.adapter=null)")


def check_world(recipe: Recipe, world_size: int) -> None:
    """Raise FieldError if the number of processes does not fit the layout, or the batch does not divide over them."""
    parallel, train = recipe.parallel, recipe.train
    one_copy = parallel.model_parallel_size
    if world_size % one_copy:
        raise FieldError(
            "parallel",
            f"tensor x pipeline x context = {one_copy} processes hold the model once; {world_size} is not a multiple",
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


def _check_data(recipe: Recipe) -> None:
    data = recipe.data
    if not data.sources("train"):
        raise FieldError("data.train", "must name at least one source")
    data.sources("valid")
    if data.turns == "split" and data.supervise != "assistant":
        raise FieldError(
            "data.turns", "split makes a sample of each of the assistant's turns, which data.supervise names"
        )
    _check_variables(data.chat_template_kwargs)


def _check_variables(variables: dict[str, Any]) -> None:
    for name, value in variables.items():
        if name in ("messages", "tools", "add_generation_prompt"):
            raise FieldError(f"data.chat_template_kwargs.{name}", "is what the chat template gets from the rows")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            fault = f"must be a value that JSON has, not {shortened(value)}"
            raise FieldError(f"data.chat_template_kwargs.{name}", fault) from None


def _check_objective(recipe: Recipe) -> None:
    name = recipe.objective.name
    if name in ("sft", "dft", "bft"):
        return
    module, colon, _ = name.partition(":")
    if not colon:
        raise FieldError("objective.name", f"{name!r} is none of sft, dft, bft, and no package.module:attribute")
    user_code.check_source("objective.name", module)


def _check_schedule(recipe: Recipe) -> None:
    train = recipe.train
    if (train.iterations is None) == (train.epochs is None):
        raise FieldError("train.iterations", "give either train.iterations or train.epochs")
    if train.min_lr > train.lr:
        raise FieldError("train.min_lr", f"is the end of the schedule, and above train.lr ({train.lr})")
    if train.warmup_iterations and train.iterations and train.warmup_iterations >= train.iterations:
        raise FieldError("train.warmup_iterations", f"must be below train.iterations ({train.iterations})")
    if train.keep_best and not (
        recipe.data.valid and train.save_every and train.validate_every and train.save_every % train.validate_every == 0
    ):
        raise FieldError(
            "train.keep_best",
            "a checkpoint is judged by the validation at its step: give data.valid, train.save_every and "
            "train.validate_every, of which save_every is a multiple",
        )
    if recipe.data.packing and train.micro_batch_size != 1:
        raise FieldError(
            "train.micro_batch_size",
            f"a packed micro-batch is one row, not {train.micro_batch_size}: raise data.seq_length for a larger one, "
            "or set data.packing to false",
        )


def _check_layout(recipe: Recipe) -> None:
    parallel = recipe.parallel
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise FieldError("parallel.virtual_pipeline", "needs parallel.pipeline above 1")
    if parallel.sequence_parallel and parallel.tensor == 1:
        raise FieldError("parallel.sequence", "sequence parallelism shards over tensor ranks: parallel.tensor is 1")


def _check_model(recipe: Recipe, model: ModelShape) -> None:
    parallel = recipe.parallel
    for count, what in (
        (model.heads, "attention heads"),
        (model.kv_heads, "key/value heads"),
        (model.ffn, "feed-forward columns"),
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


def _check_lora(recipe: Recipe) -> None:
    """Raise FieldError if the adapters' settings are invalid.

    `_check_model` covers their layout too: a TP rank holds whole heads of q, k and v, of the adapters as of the model.
    """
    lora = recipe.lora
    if lora is None:
        return
    if lora.dropout:
        raise FieldError(
            "lora.dropout",
            f"must be 0, not {lora.dropout}: each rank would draw the mask of its own part, and a run would depend on "
            "its layout",
        )
    known = [name for names in LORA_TARGETS.values() for name in names]
    unknown = [name for name in lora.modules if name not in known]
    if unknown or not lora.modules:
        what = ", ".join(map(str, unknown)) or "an empty list"
        raise FieldError("lora.target", f"{what}: takes all, attention, mlp, or a list of {', '.join(known)}")


def _check_flags(recipe: Recipe) -> None:
    """Check the numbers under `megatron`, and the flag that a run reads before Megatron parses it."""
    for flag, value in recipe.megatron.items():
        items = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, dict | list | tuple) for item in items):
            raise FieldError(f"megatron.{flag}", f"must be a value or a list of values, not {shortened(value)}")
        if any(map(_not_finite, items)):
            raise FieldError(f"megatron.{flag}", f"must be finite, not {shortened(value)}")
    minutes = recipe.megatron.get(TIME_OUT, 1)
    if isinstance(minutes, bool) or not isinstance(minutes, int | float):
        raise FieldError(f"megatron.{TIME_OUT}", f"must be minutes above 0, not {minutes!r}")
    if fault := TIME_OUT_MINUTES.fault(minutes):
        raise FieldError(f"megatron.{TIME_OUT}", fault)


def _not_finite(value: object) -> bool:
    """Return whether a flag's value is NaN or infinity, as a number or as text, which Megatron reads as one."""
    if not isinstance(value, str | float):
        return False
    try:
        return not math.isfinite(float(value))
    except ValueError:
        return False


def check_output(recipe: Recipe) -> None:
    """Raise FieldError if the run's folder cannot be made or written to."""
    folder = Path(recipe.output).absolute()
    if folder.resolve() == Path("/"):
        raise FieldError("output", "is the root folder: name a folder for the run")
    with reading(str(folder), "output"):
        nearest = next(place for place in (folder, *folder.parents) if place.exists())
    if not nearest.is_dir():
        raise FieldError("output", f"{nearest} is a file: name a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise FieldError("output", f"there is no permission to write in {nearest}")
