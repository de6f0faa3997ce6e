"""Megatron's argument list for a recipe, and the checks of the flags that a recipe passes through.

Megatron 0.19.2 reads nearly everything from its global arguments, whatever configuration object it is given. A recipe
therefore becomes a command line, which Megatron's own parser and validation process.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Collection
from typing import Any

from bft_megatron.errors import FieldError
from bft_megatron.recipe import flags
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.folder import RunFolder


def megatron_arguments(
    recipe: Recipe, model_flags: list[str], device_flags: list[str], iterations: int, validation: tuple[int, int]
) -> list[str]:
    """Return the argument list of a run: the flags of `flags.MADE`, of the model, of the device and of `megatron:`.

    Args:
        model_flags: the flags of the architecture (`hf.megatron_flags`).
        device_flags: the flags of the device (`initialize.device_flags`).
        iterations: steps of the whole run.
        validation: (rows per iteration, iterations of a whole pass); (0, 0) without a validation set.

    Raises:
        FieldError: a flag under `megatron:` is refused or has a field of its own.
    """
    folder = RunFolder.of(recipe)
    inputs = flags.FlagInputs(recipe, iterations, *validation, folder.checkpoints, folder.tensorboard)
    passed = passed_through(recipe)
    made = {made.flag: made.value(inputs) for made in flags.MADE if made.flag not in passed}
    return [*_argument_list(made), *model_flags, *without(device_flags, passed), *_argument_list(passed)]


def passed_through(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's `megatron:` flags; the value false omits a flag that a run sets by default.

    Raises:
        FieldError: a flag is refused or has a field of its own in the recipe.
    """
    for flag, value in recipe.megatron.items():
        if reason := flags.refusal(flag, value):
            raise FieldError(f"megatron.{flag}", reason)
    return recipe.megatron


def check_passed_through(recipe: Recipe) -> None:
    """Raise FieldError if a name under `megatron:` is not a flag of Megatron. Imports Megatron's parser."""
    if not recipe.megatron:
        return
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    known = {option.lstrip("-") for option in parser._option_string_actions}
    for flag in recipe.megatron:
        if flag not in known:
            close = difflib.get_close_matches(flag, known, n=1)
            raise FieldError(
                f"megatron.{flag}", f"Megatron has no such flag{f'; did you mean {close[0]}?' if close else ''}"
            )


def without(arguments: list[str], flags: Collection[str]) -> list[str]:
    """Return an argument list without some flags, given by their names, and their values."""
    kept, keep = [], True
    for word in arguments:
        if word.startswith("--"):
            keep = word[2:] not in flags
        if keep:
            kept.append(word)
    return kept


def _argument_list(values: dict[str, Any]) -> list[str]:
    arguments = []
    for flag, value in values.items():
        if value is False or value is None:
            continue
        arguments.append(f"--{flag}")
        if value is not True:
            arguments += [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]
    return arguments
