"""A real distributed optimizer over three small parameters, each in a gradient bucket that is padded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SIZE = 100
"""Elements of a parameter; a bucket is padded to a multiple of 128 for each rank."""


class Three(torch.nn.Module):
    """Parameters that hold 1, 2 and 3."""

    def __init__(self) -> None:
        super().__init__()
        self.parameters_ = torch.nn.ParameterList(torch.full((SIZE,), float(i + 1)) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """A number whose gradient is x for every parameter."""
        return sum((x * p).sum() for p in self.parameters_)


def build() -> tuple[Any, Any]:
    """In a world of `run_world(..., megatron=True)`: Megatron's DDP and `DistributedOptimizer` over `Three`."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    parallel_state.initialize_model_parallel()
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True, bucket_size=1)
    ddp = DistributedDataParallel(config, settings, Three())
    adam = OptimizerConfig(optimizer="adam", lr=0.1, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(adam, [ddp])
    return ddp, getattr(optimizer, "chained_optimizers", [optimizer])[0]


def step(ddp: Any, optimizer: Any) -> None:
    """One update."""
    ddp.zero_grad_buffer()
    optimizer.zero_grad()
    ddp(torch.ones(SIZE)).backward()
    ddp.finish_grad_sync()
    optimizer.step()


def saved(ddp: Any, optimizer: Any, key: str = "param") -> list[Tensor]:
    """What the fully reshardable format would save of each parameter, in the parameters' order."""
    from megatron.core.dist_checkpointing import ShardedTensor

    parameters = list(ddp.module.parameters())
    state = {str(i): ShardedTensor.from_rank_offsets(str(i), p) for i, p in enumerate(parameters)}
    shards = optimizer.sharded_param_state_fully_reshardable(state, metadata={}).values()
    found = {shard[key].key.rpartition(".")[2]: shard[key].data for shard in shards}
    return [found[str(i)] for i in range(len(parameters))]
