"""The communicators that a step uses, made before it.

NCCL makes one at a group's first collective, and takes GPU memory for it. Left to the first step, that is at its peak,
where layouts that fit run out (Megatron makes its groups, and with them nothing yet).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from bft_megatron.processes.device import current_device

GROUPS: tuple[Callable[[], dist.ProcessGroup], ...] = (
    parallel_state.get_tensor_model_parallel_group,
    parallel_state.get_pipeline_model_parallel_group,
    parallel_state.get_context_parallel_group,
    lambda: parallel_state.get_data_parallel_group(with_context_parallel=True),  # gradients and the divisor
    parallel_state.get_model_parallel_group,  # the gradient's norm
)


def warm_up(chunks: list[GPTModel]) -> list[GPTModel]:
    """A hook for `GPTModelConfig.pre_wrap_hooks`, which run when the groups exist and the model is not yet wrapped.

    Collective: a SUM of one number in each of the rank's groups of more than one rank.
    """
    for group in GROUPS:
        if dist.get_world_size(group()) > 1:
            dist.all_reduce(torch.zeros(1, device=current_device()), group=group())
    return chunks
