"""Every collective of the objective, over tensor, context and data parallelism, with its bytes: as the formula says."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bft_megatron.labels import IGNORE_INDEX
from bft_megatron.recipe.schema import ObjectiveSettings
from bft_megatron.reporting.totals import Meter
from bft_megatron.training import measuring
from bft_megatron.training.batch import Batch
from bft_megatron.training.head import Head
from bft_megatron.training.step import Step
from tests.helpers.collectives import Collectives
from tests.helpers.traffic import objective
from tests.helpers.world import run_world

S, H, V = 64, 16, 32
EDGES = [0, 24, 56, 64]  # two samples and the tail
TP = CP = DP = SOURCES = 2
EAFT = "examples.objectives.eaft:record"


def _batch() -> Batch:
    labels = torch.arange(S) % V
    labels[:5] = labels[20:40] = labels[EDGES[2] :] = IGNORE_INDEX
    row = torch.zeros(1, S, dtype=torch.int64)
    return Batch(
        tokens=row,
        labels=labels[None],
        position_ids=row,
        samples=torch.tensor([2]),
        weight=torch.ones(1, 3),
        padding=torch.arange(S)[None] >= EDGES[2],
        real_tokens=torch.tensor([EDGES[2]]),
        row=torch.tensor([0]),
        source=torch.tensor([1]),
        cu_seqlens=torch.tensor([EDGES], dtype=torch.int32),
        max_seqlen=torch.tensor([32]),
    )


def _train_step(name: str, head: str, windows: str) -> tuple[list[tuple[str, str, int]], ...]:
    """On a rank: (group, collective, bytes) of forward, loss, backward and report; the rank's supervised tokens."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    parallel_state.initialize_model_parallel(TP, context_parallel_size=CP)
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=1, hidden_size=H, num_attention_heads=TP, tensor_model_parallel_size=TP, sequence_parallel=True
    )
    layer = ColumnParallelLinear(H, V, config=config, init_method=torch.nn.init.normal_, bias=False)
    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "context": parallel_state.get_context_parallel_group(),
        "step": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    names = {group.group_name: name for name, group in groups.items()}
    settings = ObjectiveSettings(name=name, head=head, cp_windows=windows, group_size=3)
    meter = Meter(SOURCES)
    step, batch = Step(settings, V, measuring.into(meter)), _batch()
    geometry = batch.geometry(windows)
    mine = Head(settings, V, geometry.part(batch.labels), entropy="entropy" in step.objective.needs)
    hidden = torch.randn(S // CP // TP, 1, H, requires_grad=True)
    parts = [Collectives() for _ in range(4)]
    with parts[0]:
        logp = mine(hidden_states=hidden, output_layer=layer, output_weight=None)
    with parts[1]:
        loss, _, _ = step._loss(
            logp, batch.micro_batch(settings, mask_padding=False), mine, partial(step._report, batch)
        )
    with parts[2]:
        loss.backward()
    with parts[3]:
        meter.reduce(groups["step"])
    seen = [[(names[g], *s) for g, s in zip(part.groups, part.seen, strict=True)] for part in parts]
    return *seen, geometry.supervised.view(TP, -1).sum(1).tolist()


@pytest.mark.parametrize(
    ("name", "head", "windows"),
    [("bft", "logits", "exact"), ("sft", "logits", "per_rank"), (EAFT, "chunked", "exact")],
    ids=["bft", "sft", "eaft"],
)
def test_every_collective_and_its_bytes(name: str, head: str, windows: str):
    ranks = run_world(TP * CP * DP, _train_step, name, head, windows, megatron=True)
    entropy, longest = name == EAFT, max(sum(rank[-1]) for rank in ranks)
    for forward, loss, backward, report, held in ranks:
        n = S // CP if head == "logits" else sum(held)
        gathered = longest if windows == "exact" else 0
        expected = objective(n, len(EDGES) - 1, CP, gathered, entropy, SOURCES)
        # The output layer's own, or what stands for them: the hidden states once forward and twice backward.
        part = 4 * H * (S // CP // TP if head == "logits" else max(held))
        assert forward[0] == ("tensor", "allgather_base", part)
        assert {op for _, op, _ in forward[1:]} == {"allreduce"}
        assert sorted(backward) == [("tensor", "allgather_base", part), ("tensor", "reduce_scatter_base", TP * part)]
        assert _sum(forward[1:]) == {"tensor": expected["tensor"]}
        assert _sum(loss) == {"context": expected["context"]}
        assert [op for _, op, _ in loss].count("allgather_base") == (windows == "exact")
        assert _sum(report) == {"step": expected["step"]}


def _sum(seen: list[tuple[str, str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for group, _, given in seen:
        total[group] = total.get(group, 0) + given
    return total
