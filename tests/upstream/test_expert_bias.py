"""A router with a bias for its experts counts the tokens that are no padding."""

from __future__ import annotations

import pytest
import torch

from bft_megatron.upstream import expert_bias
from tests.helpers.world import run_world

PADDING = torch.tensor([[False] * 5 + [True] * 3, [False] * 2 + [True] * 6]).t()  # [s, b], as Megatron's layer has it


def _counted(mended: bool) -> list[float]:
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe.router import TopKRouter

    parallel_state.initialize_model_parallel()
    if mended:
        expert_bias.install()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=1,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_load_balancing_type="none",
        use_cpu_initialization=True,
    )
    router = TopKRouter(config, ProcessGroupCollection.use_mpu_process_groups())
    _, chosen = router(torch.randn(8, 2, 16), PADDING)
    assert chosen.sum() == 2 * PADDING.numel()
    return [router.local_tokens_per_expert.sum().item(), (chosen & ~PADDING.reshape(-1, 1)).sum().item()]


def test_padding_is_not_counted():
    ((counted, expected),) = run_world(1, _counted, True, megatron=True)
    assert counted == expected == 2 * 7


def test_without_the_change_a_mask_fails():
    with pytest.raises(AssertionError, match="must match the size"):
        run_world(1, _counted, False, megatron=True)
