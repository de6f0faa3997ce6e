"""What a plan says of hybrids: their layers, a rule that is linear in the row's length, and its published time."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from bft_megatron.plan import modelled_delta_net, report
from bft_megatron.plan.estimate import Speeds
from bft_megatron.plan.hardware import Cluster, lookup
from bft_megatron.plan.known import model_config
from bft_megatron.plan.memory import Ledger, Work
from bft_megatron.plan.plan import plan
from bft_megatron.plan.processes import each
from bft_megatron.recipe import reader
from bft_megatron.recipe.schema import Recipe
from bft_megatron.upstream import without_values
from tests.helpers.commands import ROOT


@pytest.fixture(scope="module")
def made() -> Recipe:
    overrides = [f"model={ROOT / 'recipes' / 'tiny_hybrid'}", f"data.train={ROOT / 'recipes' / 'tiny' / 'train.jsonl'}"]
    return reader.load(ROOT / "recipes" / "tiny_hybrid.yaml", [*overrides, "data.valid=null"])


def rule(length: int) -> dict[str, list[Work]]:
    """The rule's kernels by phase: 32 heads of 128 in bf16."""
    [found] = each(_rule, [(length,)])
    return found


def _rule(length: int) -> dict[str, list[Work]]:
    def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(1, length, 32, *shape, dtype=dtype, device="meta", requires_grad=True)

    without_values.join(0, 1)
    with Ledger("meta", lambda _: ("tp", 1)) as ledger:
        inputs: list[Any] = [leaf(128), leaf(128), leaf(128), leaf(dtype=torch.float32), leaf()]
        with ledger.within("activations", "forward"):
            out, _ = modelled_delta_net.KERNELS[2](*inputs)
        with ledger.within("backward", "backward"):
            out.sum().backward()
    found: dict[str, list[Work]] = {"forward": [], "backward": []}
    for (phase, work), n in ledger.step.work.items():
        if work.kind == "delta rule":
            found[phase] += [work] * n
    return found


def test_the_rule_is_linear_in_the_length():
    short, long = rule(4096), rule(8192)
    for phase, figure in {"forward": 182_272, "backward": 524_288}.items():
        assert sum(work.flops for work in long[phase]) == figure * 8192 * 32
        assert sum(work.flops for work in short[phase]) == figure * 4096 * 32


@pytest.mark.parametrize(("phase", "published"), [("forward", 0.472e-3), ("backward", 1.444e-3)])
def test_the_rule_takes_the_published_time(phase: str, published: float, made: Recipe):
    """Of flash-linear-attention on an H200, in FlashQLA's benchmark: 32 heads over 8,192 tokens."""
    speeds = Speeds(made, lookup("h200"), 1, 8)
    assert sum(map(speeds.kernel, rule(8192)[phase])) == pytest.approx(published, rel=0.15)


def test_context_parallel_ranks_share_a_delta_net_out_by_heads(made: Recipe):
    two = replace(made, parallel=replace(made.parallel, context=2))
    planned = plan(two, model_config(two.model), Cluster(lookup("h100-80g"), 2, 8))
    exchanges = {
        phase: n * m.bytes
        for (phase, m), n in planned.stages[0].trace.step.collectives.items()
        if m.group == "cp" and "alltoall" in m.operator
    }
    assert exchanges.keys() == {"forward", "backward"}
    text = io.StringIO()
    report.show(planned, Console(file=text, width=200))
    assert "gated delta nets in 3 of 4 layers" in text.getvalue()
