"""Megatron's command line, and the hooks of a module."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch

from bft_megatron.errors import FieldError
from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.megatron_flags import megatron_flags
from bft_megatron.recipe import reader
from bft_megatron.training.arguments import megatron_arguments
from bft_megatron.training.initialize import CPU_FLAGS
from bft_megatron.upstream import command_line, model_chunk
from tests.helpers.runs import MODEL, RECIPE
from tests.helpers.world import run_world


def _parsed() -> tuple[int, bool]:
    before = sys.argv
    made = reader.load(RECIPE, ["train.seed=4321"])
    margs = command_line.parse(megatron_arguments(made, megatron_flags(read_config(MODEL)), CPU_FLAGS, 3, (0, 0)))
    return margs.seed, sys.argv is before


def test_arguments_come_from_the_list_and_leave_sys_argv_as_it_was():
    assert run_world(1, _parsed, megatron=True) == [(4321, True)]


def _refused(more: list[str]) -> tuple[str, str]:
    flags = megatron_arguments(reader.load(RECIPE), megatron_flags(read_config(MODEL)), CPU_FLAGS, 3, (0, 0))
    with pytest.raises(FieldError) as error:
        command_line.parse([*flags, *more])
    return error.value.field, error.value.message


@pytest.mark.parametrize(
    ("more", "field", "message"),
    [
        (["--recompute-granularity", "fulll"], "megatron.recompute-granularity", "invalid choice: 'fulll'"),
        (["--log-throughput", "maybe"], "megatron", "unrecognized arguments: maybe"),
        (["--attention-backend", "lokal"], "megatron", "Megatron refuses the run's flags: 'lokal'"),
    ],
)
def test_what_megatron_refuses_is_an_error_of_the_recipe(more: list[str], field: str, message: str):
    [(found, said)] = run_world(1, _refused, more, megatron=True)
    assert found == field
    assert said.startswith(message)


@pytest.mark.parametrize("error", [FileExistsError, MemoryError])
def test_what_no_flag_is_to_blame_for_is_left_as_it_is(error: type[Exception]):
    with pytest.raises(error), command_line.refusals():
        raise error


def test_megatrons_parser_takes_no_list():
    from megatron.training import arguments

    taken = inspect.signature(arguments.parse_and_validate_args).parameters
    assert set(taken) == {"extra_args_provider", "args_defaults", "ignore_unknown_args"}


def test_the_hooks_before_a_module_run_without_it_and_others_are_seen():
    layer, called = torch.nn.Linear(2, 2), []
    layer.register_forward_pre_hook(lambda module, args: called.append((module, args)))
    model_chunk.run_pre_hooks(layer)
    assert called == [(layer, ())]
    assert not model_chunk.has_hooks(layer)
    layer.register_forward_hook(lambda *_: None)
    assert model_chunk.has_hooks(layer)
