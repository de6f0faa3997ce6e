"""The groups in which a step communicates are those whose communicators are created before the first step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.hub import find_model
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.prepared import RunRows, prepare_rows
from bft_megatron.training import communicators
from bft_megatron.upstream import training_loop
from tests.helpers.collectives import Collectives
from tests.helpers.runs import Case, Layout, do_nothing, make_recipe, train_rank
from tests.helpers.world import run_world


def _groups(made: Recipe, prepared: RunRows) -> tuple[set[str], set[str]]:
    """On a rank: the names of the groups with other ranks that are warmed up, and of those that a step uses."""
    warmed: set[str] = set()
    used: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(communicators, "warm_up", _noting(warmed, communicators.warm_up))
        training_loop.TRAIN_STEP.wrap(partial(_noting, used))
        train_rank(made, prepared, do_nothing)
    return warmed, used


def _noting(groups: set[str], call: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        with Collectives() as collectives:
            result = call(*args, **kwargs)
        groups.update(name for name in collectives.groups if c10d._resolve_process_group(name).size() > 1)
        groups.discard(dist.group.WORLD.group_name)  # the start of the run has used it
        return result

    return noted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("tiny", Layout(tensor=2, pipeline=2, sequence=True)),
        ("qwen3", Layout(pipeline=2, virtual_pipeline=2, context=2)),
        ("qwen3_moe", Layout(tensor=2, data=2, expert=2, sequence=True)),
        ("qwen3_moe", Layout(data=4, expert=2, expert_tensor=2)),
        ("qwen3_moe", Layout(pipeline=2, context=2, expert=2)),
        ("hybrid", Layout(tensor=2, context=2)),
        ("next", Layout(pipeline=2, context=2, expert=2)),
    ],
    ids=str,
)
def test_a_steps_groups_are_warmed_up_and_no_others(data: Path, tmp_path: Path, model: str, layout: Layout):
    words = ["data.valid=null", "train.global_batch_size=4", "train.validate_every=null"]
    made = make_recipe(tmp_path / "run", data, Case(model=model, pad_multiple=4), layout, 1, *words)
    folder = find_model(made.model)
    prepared = prepare_rows(made, folder, read_config(folder).vocab_size)
    for warmed, used in run_world(layout.world, _groups, made, prepared, megatron=True):
        assert used == warmed
