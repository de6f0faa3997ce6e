"""A gradient of one layer on one rank that is not finite skips the step on every rank, and the replicas stay equal."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.hub import find_model
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.folder import RunFolder
from bft_megatron.run.prepared import RunRows, prepare_rows
from bft_megatron.upstream import training_loop
from tests.helpers.runs import Case, Layout, do_nothing, make_recipe, read_metrics, train_rank
from tests.helpers.world import run_world

STEPS, BAD = 3, 2
EXPERT = "mlp.experts.local_experts.1.linear_fc1.weight"
"""Of the layers of the last rank."""
DECAY = "self_attention.A_log"


def _train(made: Recipe, prepared: RunRows, bad_parameter: str) -> list[dict[str, Tensor]]:
    """Train a rank, the last one with a NaN in step 2 -> its parameters after each step."""
    after: list[dict[str, Tensor]] = []

    def poisoned(train_step: Callable[..., Any]) -> Callable[..., Any]:
        def step(forward: Any, data: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            parameters = dict(model[0].module.named_parameters())
            bad = len(after) == BAD - 1 and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
            those = [p for name, p in parameters.items() if name.endswith(bad_parameter)] if bad else []
            hooks = [parameter.register_hook(lambda gradient: gradient * torch.nan) for parameter in those]
            result = train_step(forward, data, model, *args, **kwargs)
            for hook in hooks:
                hook.remove()
            after.append({name: p.detach().clone() for name, p in parameters.items()})
            return result

        return step

    training_loop.TRAIN_STEP.wrap(poisoned)
    train_rank(made, prepared, do_nothing)
    return after


@pytest.mark.parametrize(
    ("model", "parameter", "layout"),
    [
        ("qwen3_moe", EXPERT, Layout(data=2, expert=2)),
        pytest.param("qwen3_moe", EXPERT, Layout(tensor=2, sequence=True, expert=2), marks=pytest.mark.slow),
        pytest.param("qwen3_moe", EXPERT, Layout(data=4, expert=2), marks=pytest.mark.slow),
        pytest.param("hybrid", DECAY, Layout(tensor=2), marks=pytest.mark.slow),
        pytest.param("hybrid", DECAY, Layout(data=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_nan_in_one_layer_on_one_rank_skips_the_step_everywhere(
    data: Path, tmp_path: Path, model: str, parameter: str, layout: Layout
):
    words = ["data.valid=null", "train.validate_every=null", "train.global_batch_size=4", "train.keep_last=9"]
    made = make_recipe(tmp_path / "run", data, Case(model=model), layout, STEPS, *words)
    found, folder = find_model(made.model), RunFolder.of(made)
    prepared = prepare_rows(made, found, read_config(found).vocab_size)
    ranks = run_world(layout.world, _train, made, prepared, parameter, megatron=True)
    lines, _ = read_metrics(folder.metrics)
    assert [line.get("skipped", False) for line in lines] == [False, True, False]
    assert sorted(folder.iterations()) == [1, 3]
    for first, second, third in ranks:
        assert all(second[name].equal(first[name]) for name in first)
        assert not any(third[name].equal(second[name]) for name in second if "linear" in name)
    for name, value in ranks[0][-1].items():
        if (layout.tensor == 1 and "experts" not in name) or "norm" in name or "router" in name:
            assert all(rank[-1][name].equal(value) for rank in ranks), name
