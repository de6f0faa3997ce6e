"""Megatron's own training loop on one rank of a cluster that is not there: two steps over tensors without values.

The recipe takes the path of a real run, `training.arguments` and `training.loop.pretrain` with our step, in a process
whose process group is torch's fake one. For GPUs the CUDA surface is redirected to torch's meta device, and the layers
are `modelled`; for a recipe of the CPU the CPU's own layers run under FakeTensorMode, since torch chooses its CPU
kernels by device. The first step makes the optimizer's state, the second is the one that is measured.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from bft_megatron.data.dataset import VIRTUAL_LENGTH, full_row
from bft_megatron.hf import architectures
from bft_megatron.hf.architectures import ModelConfig
from bft_megatron.plan.memory import Ledger
from bft_megatron.plan.probe import Enough, StepProbe, Trace
from bft_megatron.recipe.schema import Recipe
from bft_megatron.reporting.totals import Meter
from bft_megatron.training import arguments, initialize, loop
from bft_megatron.training.model import model_config
from bft_megatron.training.step import Step
from bft_megatron.upstream import command_line, cuda_on_cpu, rotary, without_values

LEFT_OUT = (
    "--save",
    "--load",
    "--save-interval",
    "--tensorboard-dir",
    "--exit-signal-handler",
    "--use-cpu-initialization",
)
"""Flags of a run that a plan does without."""
INSTEAD = ("--num-workers", "0", "--disable-gloo-process-groups")
MANY = 1_000_000
"""Iterations of the schedule, of which two are run: more than any warm-up has."""


def run(
    recipe: Recipe,
    config: ModelConfig,
    rank: int,
    world: int,
    provider: Callable[..., Any],
) -> Trace:
    """Trace one rank's step. In a process of its own: Megatron's state is global.

    Args:
        recipe: checked, for this world.
        config: of the model.
        provider: of the data set, as Megatron calls it: `full_rows`, or the run's own.

    Raises:
        FieldError: a flag under `megatron:` that Megatron does not have.
        Exception: whatever Megatron refuses.
    """
    on_cpu = recipe.device == "cpu"
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0")
    cuda_on_cpu.install("cpu" if on_cpu else "meta")
    without_values.join(rank, world)
    without_values.install()
    if on_cpu:
        rotary.install()
    arguments.check_passed_through(recipe)
    flags = arguments.megatron_arguments(
        recipe,
        architectures.megatron_flags(config),
        initialize.CPU_FLAGS if on_cpu else initialize.GPU_FLAGS,
        iterations=MANY,
        validation=(0, 0),
    )
    step = Step(recipe.objective, config.vocab_size, Meter(recipe.data.most_sources))
    ledger = Ledger("cpu" if on_cpu else "meta", kind_of_group)
    fake = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) if on_cpu else contextlib.nullcontext()
    with fake, ledger:
        if not on_cpu:
            from bft_megatron.plan import modelled

            modelled.install()
        margs = command_line.parse([*_without(flags, LEFT_OUT), *INSTEAD])
        margs.do_train = True  # which it would read from a tensor
        model = model_config(recipe, config, None, margs, on_cpu, fill=False)  # there are no values to fill it with
        model.transformer.finalize_model_grads_func = step.finalize_grads
        if not on_cpu:
            model.transformer_layer_spec = modelled.layer_spec
        probe = StepProbe(ledger)
        probe.install()
        with contextlib.suppress(Enough):
            loop.pretrain(margs, model, step, provider)
    return probe.trace(rank)


def kind_of_group(name: str) -> tuple[str, int]:
    """A process group's name -> tp, cp, pp, dp or world, and its size."""
    from megatron.core import parallel_state as state

    groups: list[tuple[str, Callable[[], dist.ProcessGroup]]] = [
        ("tp", state.get_tensor_model_parallel_group),
        ("cp", state.get_context_parallel_group),
        ("pp", state.get_pipeline_model_parallel_group),
        ("dp", lambda: state.get_data_parallel_group(with_context_parallel=True)),
        ("dp", state.get_data_parallel_group),
    ]
    for kind, of in groups:
        with contextlib.suppress(AssertionError):
            if of().group_name == name:
                return kind, of().size()
    return "world", dist.get_world_size()


def _without(flags: list[str], names: tuple[str, ...]) -> list[str]:
    """The argument list less some flags and their values."""
    kept, skipping = [], False
    for word in flags:
        if word.startswith("--"):
            skipping = word in names
        if not skipping:
            kept.append(word)
    return kept


def full_rows(recipe: Recipe) -> Callable[..., Any]:
    """A provider of rows that a single sample fills, all of it learned: what needs the most of everything."""
    row = full_row(recipe.data.seq_length, packing=recipe.data.packing).item()

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return VIRTUAL_LENGTH

        def __getitem__(self, _: int) -> dict[str, torch.Tensor]:
            return row

    def provide(*_: Any, vp_stage: int | None = None) -> tuple[Any, None, None]:
        return Rows(), None, None

    provide.is_distributed = True  # type: ignore[attr-defined]  # Megatron's mark on a function
    return provide
