"""The layout tests can fail: each thing that a layout may get wrong, broken by hand, is far outside the tolerance."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

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


@pytest.mark.parametrize(
    ("breaking", "case", "layout", "hurt"),
    [
        (drop_edges_on_the_middle_stage, Case(), Layout(pipeline=4), "train 1 lm_loss"),
        (average_per_microbatch, Case(), Layout(context=2), "gradient lm_head.weight"),
        (let_windows_cross_samples, Case(), Layout(), "train 1 mean_confidence"),
        (keep_norm_gradients_local, Case(), Layout(tensor=2, sequence=True), "gradient model.norm.weight"),
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
