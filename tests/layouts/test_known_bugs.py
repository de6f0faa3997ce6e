"""Bugs of parallel composition that others found in Megatron (NVIDIA/Megatron-LM issue 7452), for a dense fine-tune.

That its default divides by each context rank's own count is shown in `test_proofs`; that gradient norms count each
parameter once, and that norms of heads and biases are summed, in the layout tests (Qwen variants).
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from bft_megatron.objective.logprobs import vocab_parallel_logprobs
from tests.helpers.world import run_world

SMOOTHING = 0.1


def token_losses(tp: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Megatron's cross entropy with label smoothing, and our -log p, of the same logits over `tp` shards."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    parallel_state.initialize_model_parallel(tp)
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 1, 16, generator=g) * 3
    targets = torch.randint(16, (6, 1), generator=g)
    shard = logits.chunk(tp, -1)[dist.get_rank()].contiguous()
    ours = -vocab_parallel_logprobs(shard, targets, group=parallel_state.get_tensor_model_parallel_group())
    return vocab_parallel_cross_entropy(shard.clone(), targets, SMOOTHING), ours


def test_label_smoothing_in_megatron_depends_on_the_tensor_parallel_size():
    """Its tail is a mean over a rank's own part of the vocabulary. A recipe that asks for it is refused."""
    ((whole, ours),) = run_world(1, token_losses, 1, megatron=True)
    shards = run_world(2, token_losses, 2, megatron=True)
    assert all((smoothed - whole).abs().max() > 0.01 for smoothed, _ in shards)
    for _, logp in shards:
        torch.testing.assert_close(logp, ours)
