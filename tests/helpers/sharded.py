"""Megatron models in a forked world, built as training builds them: arguments, configuration, hook, model."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, num_microbatches_calculator, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import global_vars
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder

from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.load import buffers_hook, weights_hook
from bft_megatron.hf.megatron_flags import configure, megatron_flags
from bft_megatron.layers.norm_after_rotary import norm_after_rotary
from bft_megatron.layers.spec import layer_spec
from bft_megatron.training.initialize import CPU_FLAGS
from bft_megatron.upstream import checkpoint_writer, command_line
from tests.helpers import tiny_models


@dataclass(frozen=True)
class Sharding:
    """The parallel sizes of a model that is built without a recipe; data-parallel ranks are copies."""

    tp: int = 1
    sp: bool = False
    """Whether the tokens between the layers are sharded over the TP ranks."""
    pp: int = 1
    vpp: int = 1
    first: int | None = None
    """Layers of the first pipeline stage, where they are not dealt evenly."""
    dp: int = 1
    ep: int = 1
    etp: int = 1

    def __str__(self) -> str:
        sizes = [f"{name}{getattr(self, name)}" for name in ("vpp", "dp", "ep", "etp") if getattr(self, name) > 1]
        others = [name for name, on in (("sp", self.sp), ("uneven", self.first)) if on]
        return "-".join([f"tp{self.tp}-pp{self.pp}", *sizes, *others])

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def flags(self) -> list[str]:
        flags = ["--tensor-model-parallel-size", str(self.tp), "--pipeline-model-parallel-size", str(self.pp)]
        if self.vpp > 1:
            flags += ["--num-virtual-stages-per-pipeline-rank", str(self.vpp)]
        flags += ["--expert-model-parallel-size", str(self.ep), "--expert-tensor-parallel-size", str(self.etp)]
        if self.sp:
            flags += ["--sequence-parallel"]
        if self.first is not None:
            flags += ["--decoder-first-pipeline-num-layers", str(self.first)]
        return flags


RUN_FLAGS = [
    *("--seq-length", "24", "--micro-batch-size", "2", "--global-batch-size", "4"),
    *("--train-iters", "1", "--lr", "1e-4", "--no-gradient-accumulation-fusion"),
    *("--moe-token-dispatcher-type", "alltoall"),
]


TRANSFORMER_ENGINE = ("--transformer-impl", "transformer_engine")


@contextlib.contextmanager
def model(
    folder: Path,
    layout: Sharding,
    *,
    random: bool = False,
    seed: int = 7,
    flags: tuple[str, ...] = (),
    adapt: Callable[[Any], None] = lambda _: None,
) -> Iterator[list[Any]]:
    """This rank's chunks, of the CPU's layer spec unless the flags ask for TRANSFORMER_ENGINE's.

    `adapt` gets the model's configuration last. Afterwards Megatron's globals are as before, so that one world can
    build many models.
    """
    config = read_config(folder)
    with contextlib.redirect_stdout(io.StringIO()), _clean_globals():
        args = command_line.parse([*RUN_FLAGS, *megatron_flags(config), *layout.flags, *CPU_FLAGS, *flags])
        parallel_state.initialize_model_parallel(
            layout.tp,
            layout.pp,
            layout.vpp if layout.vpp > 1 else None,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        gpt = gpt_config_from_args(args)
        configure(gpt, config)
        if args.transformer_impl == "local":
            gpt.transformer_layer_spec = layer_spec
        gpt.pre_wrap_hooks.append(weights_hook(None if random else folder, config, seed=seed))
        gpt.post_wrap_hooks.append(buffers_hook(None if random else folder, config, seed=seed))
        adapt(gpt)
        if config.norm_after_rotary:
            gpt.transformer_layer_spec = norm_after_rotary(gpt.transformer_layer_spec)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        yield [chunk.eval() for chunk in GPTModelBuilder(gpt).build_distributed_models(groups, wrap_with_ddp=False)]


@contextlib.contextmanager
def _clean_globals() -> Iterator[None]:
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        global_vars.destroy_global_vars()
        num_microbatches_calculator.destroy_num_microbatches_calculator()


@torch.no_grad()
def logits(chunks: list[Any]) -> torch.Tensor | None:
    """Logits [2, 24, padded v] of `tiny_models.prompts` by Megatron's schedule; None except on the last stage."""
    ids, _ = tiny_models.prompts()
    positions = torch.arange(ids.shape[1]).expand_as(ids)

    def forward(_: Any, chunk: Any) -> tuple[torch.Tensor, Any]:
        output = chunk(ids, positions, None)
        return output, lambda x, **_: tensor_parallel.gather_from_tensor_model_parallel_region(x)

    outputs = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[None] * len(chunks),
        model=chunks,
        num_microbatches=2,
        seq_length=ids.shape[1],
        micro_batch_size=ids.shape[0],
        forward_only=True,
        collect_non_loss_data=True,
    )
    return outputs[-1] if outputs else None


def save(chunks: list[Any], folder: Path, metadata: dict[str, Any] | None = None) -> None:
    """A torch_dist checkpoint of the weights as iteration 3, with the file that names it."""
    checkpoint_writer.without_helper_process()
    target = folder / "iter_0000003"
    if dist.get_rank() == 0:
        target.mkdir(parents=True)
        (folder / "latest_checkpointed_iteration.txt").write_text("3")
    dist.barrier()
    states = {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}
    dist_checkpointing.save(states, str(target))


def save_loaded(
    folders: dict[Path, Path],
    layout: Sharding,
    *,
    metadata: dict[str, Any] | None = None,
    **build: Any,
) -> None:
    """For each model folder: build, load, save a checkpoint into the folder it is mapped to."""
    for folder, checkpoints in folders.items():
        with model(folder, layout, **build) as chunks:
            save(chunks, checkpoints, metadata)


def stored_tensors(chunk: torch.nn.Module) -> set[tuple[Any, ...]]:
    """What a chunk puts into a checkpoint: key, shape over all ranks, place and shape of this rank's part."""
    state = chunk.sharded_state_dict()
    apply_factories(state)
    tensors, _ = extract_sharded_tensors(state)
    found = nested_values(tensors)
    return {(t.key, t.global_shape, t.global_offset, t.local_shape, t.dtype) for t in found}
