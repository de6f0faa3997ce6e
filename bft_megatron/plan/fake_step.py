"""Two steps of Megatron's own training loop over tensors without values, on one rank of a simulated cluster.

The recipe takes the same path as in a real run, `training.arguments` and `training.loop.pretrain` with our step, under
torch's fake process group. For GPUs the CUDA surface is redirected to torch's meta device, and the layers are those of
`modelled`. For a CPU recipe the CPU's own layers run under FakeTensorMode, because torch chooses CPU kernels by device.
The first step creates the optimizer's state; the second is traced.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from bft_megatron.data.dataset import VIRTUAL_LENGTH, full_row
from bft_megatron.hf.megatron_flags import megatron_flags
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.plan.memory import Ledger
from bft_megatron.plan.probe import Enough, StepProbe, Trace
from bft_megatron.recipe.schema import Recipe
from bft_megatron.reporting.expert_load import ExpertLoad
from bft_megatron.reporting.totals import Meter
from bft_megatron.training import arguments, initialize, loop, measuring
from bft_megatron.training.model import model_config
from bft_megatron.training.step import Step
from bft_megatron.upstream import command_line, cuda_on_cpu, rotary, without_values

LEFT_OUT = (
    "save",
    "load",
    "save-interval",
    "tensorboard-dir",
    "exit-signal-handler",
    "use-cpu-initialization",
)
"""Flags of a run that a plan leaves out."""
INSTEAD = ("--num-workers", "0", "--disable-gloo-process-groups")
MANY = 1_000_000
"""Iterations of the schedule, more than any warm-up has; only two of them run."""


def run(
    recipe: Recipe,
    config: ModelConfig,
    rank: int,
    world: int,
    provider: Callable[..., Any],
    load: float = 1.0,
) -> Trace:
    """Trace one rank's step. Must run in a process of its own, as Megatron's state is global.

    Args:
        recipe: a recipe that was checked for this world.
        rank, world: the simulated rank and the number of ranks.
        config: the model's configuration.
        provider: Megatron's data set provider: `full_rows`, or the run's own.
        load: tokens that this rank's experts receive, over the mean of all ranks.

    Raises:
        FieldError: a flag under `megatron:` that Megatron does not have.
        Exception: whatever Megatron raises for a recipe that it refuses.
    """
    on_cpu = recipe.device == "cpu"
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0")
    cuda_on_cpu.install("cpu" if on_cpu else "meta")
    without_values.join(rank, world)
    without_values.install()
    if config.experts is not None:
        without_values.route_evenly(load)
    if on_cpu:
        rotary.install()
    arguments.check_passed_through(recipe)
    flags = arguments.megatron_arguments(
        recipe,
        megatron_flags(config),
        initialize.CPU_FLAGS if on_cpu else initialize.GPU_FLAGS,
        iterations=MANY,
        validation=(0, 0),
    )
    meter = Meter(recipe.data.most_sources)
    mixture = config.experts is not None
    step = Step(recipe.objective, config.vocab_size, measuring.into(meter), mask_padding=mixture)
    ledger = Ledger("cpu" if on_cpu else "meta", kind_of_group)
    fake = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) if on_cpu else contextlib.nullcontext()
    with fake, ledger:
        if not on_cpu:
            from bft_megatron.layers.norm_after_rotary import norm_after_rotary
            from bft_megatron.plan import modelled, modelled_experts

            modelled.install()
        margs = command_line.parse([*arguments.without(flags, LEFT_OUT), *INSTEAD])
        margs.do_train = True  # Megatron would read it from a tensor
        model = model_config(recipe, config, None, margs, on_cpu, fill=False)  # there are no values to load
        watched = _with_experts(model, recipe, config) if mixture else None
        model.transformer.finalize_model_grads_func = measuring.finalize_grads(meter, watched)
        if not on_cpu:
            spec = modelled.layer_spec
            model.transformer_layer_spec = norm_after_rotary(spec) if config.norm_after_rotary else spec
            if recipe.lora is not None and mixture:
                model.pre_wrap_hooks.append(modelled_experts.adapt(config, recipe.lora))
        probe = StepProbe(ledger)
        probe.install()
        with contextlib.suppress(Enough):
            loop.pretrain(margs, model, step, provider)
    return probe.trace(rank)


class _UnreadLoad(ExpertLoad):
    """The load of experts as tensors without values: reduced over all ranks and not read."""

    def _take(self, counts: torch.Tensor) -> None: ...


def _with_experts(model: Any, recipe: Recipe, config: ModelConfig) -> ExpertLoad:
    from bft_megatron.training import routers

    load = _UnreadLoad(*routers.sizes(config))
    routers.install(model, recipe, load)
    return load


def kind_of_group(name: str) -> tuple[str, int]:
    """Return the kind of a named process group (tp, cp, pp, dp, ep, etp, edp or world) and its size."""
    from megatron.core import parallel_state as state

    groups: list[tuple[str, Callable[[], dist.ProcessGroup]]] = [
        ("tp", state.get_tensor_model_parallel_group),
        ("cp", state.get_context_parallel_group),
        ("pp", state.get_pipeline_model_parallel_group),
        ("dp", lambda: state.get_data_parallel_group(with_context_parallel=True)),
        ("dp", state.get_data_parallel_group),
        ("ep", state.get_expert_model_parallel_group),
        ("etp", state.get_expert_tensor_parallel_group),
        ("ep", state.get_expert_tensor_and_model_parallel_group),
        ("edp", state.get_expert_data_parallel_group),
    ]
    for kind, of in groups:
        with contextlib.suppress(AssertionError):
            if of().group_name == name:
                return kind, of().size()
    return "world", dist.get_world_size()


def full_rows(recipe: Recipe) -> Callable[..., Any]:
    """Return a provider of rows that one fully supervised sample fills, which need the most memory and time."""
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
