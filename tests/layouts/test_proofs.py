"""The layout tests can fail: each thing that a layout may get wrong, broken by hand, is far outside the tolerance."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.moe.router import Router
from torch import Tensor

from bft_megatron.hf import layer_weights, load
from bft_megatron.hf.place import Place
from bft_megatron.hf.tensors import Weight, split
from bft_megatron.layers import delta_rule, norm
from bft_megatron.layers.delta_net import HeadNorm
from bft_megatron.objective import view
from bft_megatron.training import arguments, step
from tests.helpers.comparing import TOLERANCE, differences
from tests.helpers.runs import Case, Layout, Result, make_recipe, run


def drop_edges_on_the_middle_stage() -> None:
    """One pipeline stage takes the packed row for one long sample."""
    if os.environ["RANK"] == "1":
        step.Batch.packed_seq_params = lambda self: None


def average_per_microbatch() -> None:
    """Megatron's own default in place of the exact divisor."""
    flags = arguments.megatron_arguments

    def without(*args: object) -> list[str]:
        return [flag for flag in flags(*args) if flag != "--calculate-per-token-loss"]

    arguments.megatron_arguments = without


def let_windows_cross_samples() -> None:
    """Windows run over the whole row."""
    within = view._trailing_means
    view._trailing_means = lambda x, span, g: within(x, torch.zeros_like(span), g)


def keep_norm_gradients_local() -> None:
    """Under sequence parallelism each rank sees a part of the tokens, and its norms' gradients must be summed."""
    plain = norm.RMSNorm.__init__

    def init(self: norm.RMSNorm, *args: object, **kwargs: object) -> None:
        plain(self, *args, **kwargs)
        self.weight.sequence_parallel = False

    norm.RMSNorm.__init__ = init


def fill_in_the_first_ranks_experts() -> None:
    """Each expert-parallel rank holds the same experts in place of its own."""
    place_of = load.place_of

    def without_first(*args: Any) -> Place:
        return replace(place_of(*args), first_expert=0)

    load.place_of = without_first


def keep_router_gradients_local() -> None:
    """Under sequence parallelism each rank routes a part of the tokens, and the router's gradients must be summed."""
    plain = Router.reset_parameters

    def reset(self: Router) -> None:
        plain(self)
        self.weight.sequence_parallel = False

    Router.reset_parameters = reset


def weigh_by_the_softmax_of_all() -> None:
    """The weights of the chosen experts are not divided by their sum, as of a model with norm_topk_prob false."""
    flags = arguments.megatron_arguments
    arguments.megatron_arguments = lambda *args: [*flags(*args), "--moe-router-pre-softmax"]


def halve_the_gradients_of_experts() -> None:
    """Experts are divided by the processes that share them, and their tokens have come from all already."""
    scale = DistributedDataParallel.scale_gradients

    def scale_twice(self: DistributedDataParallel, factor: float) -> None:
        scale(self, factor)
        for buffer in self.expert_parallel_buffers:
            buffer.scale_gradients(0.5)

    DistributedDataParallel.scale_gradients = scale_twice


def convolve_across_samples() -> None:
    """The convolution of a gated delta net sees the last tokens of the neighbour."""
    within = delta_rule.causal_conv1d

    def across(*args: Any, cu_seqlens: Tensor, **options: Any) -> Any:
        return within(*args, **options)

    delta_rule.causal_conv1d = across


def keep_the_state_of_the_sample_before() -> None:
    """A sample of a packed row begins with its neighbour's state."""
    within = delta_rule.chunk_gated_delta_rule

    def across(*args: Any, cu_seqlens: Tensor, **options: Any) -> Any:
        return within(*args, **options)

    delta_rule.chunk_gated_delta_rule = across


def cut_the_joined_projections_evenly() -> None:
    """A tensor-parallel rank takes neighbouring rows of the joined projections, not its part of each."""
    by_section = load.fill_part

    def fill(parameter: Tensor, weight: Weight, source: load.Source) -> None:
        if not weight.name.endswith("in_proj.weight"):
            by_section(parameter, weight, source)
            return
        tp, rank = load.tensor_parallel_of(weight)
        whole = torch.cat([source(tensor, None, 0, 0) for tensor in weight.tensors])
        parameter.copy_(whole.chunk(tp)[rank])

    load.fill_part = fill


def take_gates_for_queries() -> None:
    """The rows of query and gate, of which a file has each head's together, are taken for all queries and all gates."""
    layer_weights.split = lambda whole, *sizes, blocks=1: split(whole, *sizes)


def keep_head_norm_gradients_local() -> None:
    """A tensor-parallel rank norms its own heads: without the sum over ranks each has its own gradient."""

    def forward(self: HeadNorm, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    HeadNorm.forward = forward


MIXTURE = Case(model="qwen3_moe")
ON_TWO = Layout(data=2, expert=2)
EXPERT = "gradient model.layers.0.mlp.experts.5.down_proj.weight"
HYBRID = Case(model="hybrid")
DELTA_NET = "model.layers.0.linear_attn"
OF_HYBRIDS = [
    (convolve_across_samples, HYBRID, Layout(), f"gradient {DELTA_NET}.conv1d.weight"),
    (keep_the_state_of_the_sample_before, HYBRID, Layout(), f"gradient {DELTA_NET}.A_log"),
    (cut_the_joined_projections_evenly, HYBRID, Layout(tensor=2), f"gradient {DELTA_NET}.in_proj_qkv.weight"),
    (take_gates_for_queries, HYBRID, Layout(), "gradient model.layers.3.self_attn.q_proj.weight"),
    (keep_head_norm_gradients_local, HYBRID, Layout(tensor=2), f"gradient {DELTA_NET}.norm.weight"),
]


@pytest.mark.parametrize(
    ("breaking", "case", "layout", "hurt"),
    [
        (drop_edges_on_the_middle_stage, Case(), Layout(pipeline=4), "train 1 lm_loss"),
        (average_per_microbatch, Case(), Layout(context=2), "gradient lm_head.weight"),
        (let_windows_cross_samples, Case(), Layout(), "train 1 mean_confidence"),
        (keep_norm_gradients_local, Case(), Layout(tensor=2, sequence=True), "gradient model.norm.weight"),
        (fill_in_the_first_ranks_experts, MIXTURE, ON_TWO, EXPERT),
        (
            keep_router_gradients_local,
            MIXTURE,
            Layout(tensor=2, sequence=True),
            "gradient model.layers.0.mlp.gate.weight",
        ),
        (weigh_by_the_softmax_of_all, MIXTURE, ON_TWO, EXPERT),
        (halve_the_gradients_of_experts, MIXTURE, ON_TWO, EXPERT),
        *(pytest.param(*control, marks=pytest.mark.slow) for control in OF_HYBRIDS),
    ],
)
def test_a_broken_layout_is_seen(
    breaking: Callable[[], None],
    case: Case,
    layout: Layout,
    hurt: str,
    data: Path,
    plain: Callable[[Case, int], Result],
):
    made = make_recipe(data / f"broken-{breaking.__name__}", data, case, layout, 1)
    found = differences(run(made, layout.world, before=breaking), plain(case, 1))
    assert found[hurt] > 20 * TOLERANCE
