"""NCCL's communicators of a step, created before the first one.

NCCL creates a communicator at a group's first collective and allocates GPU memory for it; Megatron only creates the
groups. In the first step this happens near peak memory, and layouts that would fit run out of memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from bft_megatron.processes.device import current_device

Group = Callable[[], dist.ProcessGroup]

GROUPS: tuple[Group, ...] = (
    parallel_state.get_tensor_model_parallel_group,
    parallel_state.get_pipeline_model_parallel_group,
    parallel_state.get_context_parallel_group,
    lambda: parallel_state.get_data_parallel_group(with_context_parallel=True),  # gradients and the divisor
    parallel_state.get_model_parallel_group,  # whether the step is taken
    parallel_state.get_intra_distributed_optimizer_instance_group,  # the gradient's norm
)
EXPERT_GROUPS: tuple[Group, ...] = (
    parallel_state.get_expert_model_parallel_group,
    parallel_state.get_expert_tensor_parallel_group,
    parallel_state.get_expert_tensor_and_model_parallel_group,
    parallel_state.get_expert_data_parallel_group,
)


def warm_up(chunks: list[GPTModel]) -> list[GPTModel]:
    """Create the communicators, as a `GPTModelConfig.pre_wrap_hooks` hook, which runs before the model is wrapped.

    Collective: one SUM all-reduce of one number in each of this rank's groups that has more than one rank.
    """
    for group in groups(chunks):
        dist.all_reduce(torch.zeros(1, device=current_device()), group=group)
    return chunks


def groups(chunks: list[GPTModel]) -> list[dist.ProcessGroup]:
    """Return this rank's groups of more than one rank in which a step of the model communicates."""
    found = [*GROUPS, *(EXPERT_GROUPS if chunks[0].config.num_moe_experts is not None else ())]
    if any(chunk.share_embeddings_and_output_weights and (chunk.pre_process or chunk.post_process) for chunk in chunks):
        found.append(parallel_state.get_embedding_group)  # the gradient of what the first and last stage share
    return [group for get in found if dist.get_world_size(group := get()) > 1]
