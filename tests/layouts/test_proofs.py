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

from bft_megatron.hf import load
from bft_megatron.hf.place import Place
from bft_megatron.layers import norm
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


MIXTURE = Case(model="qwen3_moe")
ON_TWO = Layout(data=2, expert=2)
EXPERT = "gradient model.layers.0.mlp.experts.5.down_proj.weight"


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
