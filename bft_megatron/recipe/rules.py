"""Checks of a recipe that need more than one field; those of its layout are in `layout_rules`.

They run before any process starts and name the field to change. They catch early, and report in the recipe's terms,
settings that Megatron itself would refuse during start-up or in its first step.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from bft_megatron import user_code
from bft_megatron.errors import FieldError, reading, shortened
from bft_megatron.recipe import engine_rules, layout_rules, objectives
from bft_megatron.recipe.layout_rules import ExpertShape, ModelShape
from bft_megatron.recipe.limits import Range
from bft_megatron.recipe.schema import DELTA_NET_INPUTS, LORA_TARGETS, LoraSettings, Recipe

TIME_OUT = "distributed-timeout-minutes"
TIME_OUT_MINUTES = Range(above=0, at_most=366 * 24 * 60)


def check_recipe(recipe: Recipe, model: ModelShape) -> None:
    """Raise FieldError if values are invalid, contradict each other, or do not divide the model's sizes."""
    _check_data(recipe)
    _check_objective(recipe)
    _check_schedule(recipe)
    layout_rules.check_layout(recipe, model)
    _check_init(recipe, model)
    _check_lora(recipe, model)
    _check_moe(recipe, model)
    _check_flags(recipe)
    engine_rules.check(recipe, model)


def check_comparable(recipe: Recipe) -> None:
    """Raise FieldError if the recipe's model cannot be compared with transformers."""
    if recipe.lora is not None and recipe.lora.adapter is not None:
        raise FieldError("lora.adapter", "the base model is what is compared: leave it out (lora.adapter=null)")


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
    if name in objectives.OPTIONS:
        return objectives.check(name, recipe.objective.options)
    module, colon, _ = name.partition(":")
    if not colon:
        raise FieldError("objective.name", objectives.no_such(name))
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


def _check_init(recipe: Recipe, model: ModelShape) -> None:
    """Raise FieldError if random weights are asked for of a model with a part that only its files have."""
    if recipe.init == "random" and model.has_vision:
        raise FieldError(
            "init",
            "the model's vision part is copied from its files, and random weights have none; for a text model "
            "take a config.json with the values of text_config and an architecture of the text part, ...ForCausalLM",
        )


def _check_lora(recipe: Recipe, model: ModelShape) -> None:
    """Raise FieldError if the adapters' settings are invalid.

    `layout_rules` covers their layout too: a TP rank holds whole heads of q, k and v, of the adapters as of the model.
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
    _check_lora_target(lora, model)
    if model.experts is not None:
        _check_lora_of_experts(recipe, lora, model.experts)


def _check_lora_target(lora: LoraSettings, model: ModelShape) -> None:
    """Raise FieldError if `lora.target` names what the model does not have."""
    groups, net = dict(LORA_TARGETS), model.linear_attention
    if net is None:
        del groups["linear_attention"]
    else:
        groups["linear_attention"] = (*DELTA_NET_INPUTS[net.joined_by_head], "out_proj")
    known = [name for names in groups.values() for name in names]
    one = isinstance(lora.target, str)
    named, allowed = ([lora.target], ["all", *groups, *known]) if one else (lora.modules, known)
    unknown = [name for name in named if name not in allowed]
    if unknown or not named:
        what = ", ".join(map(str, unknown)) or "an empty list"
        takes = f"all, {', '.join(groups)}, or a list of {', '.join(known)}"
        raise FieldError("lora.target", f"{what}: this model's are {takes}")


def _check_lora_of_experts(recipe: Recipe, lora: LoraSettings, experts: ExpertShape) -> None:
    """Raise FieldError if a mixture's adapters could not be read by `peft`, or would be wrong, or there are none."""
    matrices = set(lora.modules).intersection(LORA_TARGETS["mlp"])
    if lora.experts and matrices not in (set(), {"down_proj"}, set(LORA_TARGETS["mlp"])):
        raise FieldError(
            "lora.target",
            f"{', '.join(sorted(matrices))}: peft joins the adapters of the experts' matrices, and cannot read these "
            "alone: give all of gate_proj, up_proj and down_proj, or down_proj, or set lora.experts to false",
        )
    if matrices == set(lora.modules) and not (lora.experts or experts.shared_ffn or experts.dense_layers):
        raise FieldError(
            "lora.experts", "leaves no module with an adapter: the model's only networks are experts; set it to true"
        )
    if matrices and experts.shared_ffn and recipe.megatron.get("moe-shared-expert-overlap"):
        raise FieldError(
            "megatron.moe-shared-expert-overlap",
            "takes the shared network's collectives out of its layers, and its adapters would not know: leave it out, "
            "or set lora.target to attention",
        )


def _check_moe(recipe: Recipe, model: ModelShape) -> None:
    """Raise FieldError if a dense model's recipe has settings of experts."""
    if model.experts is None and (given := [name for name, value in vars(recipe.moe).items() if value]):
        raise FieldError(f"moe.{given[0]}", "the model has no experts: leave it out")


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
