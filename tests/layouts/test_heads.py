"""The head without logits and the objectives that need entropy give one number on any layout.

The chunked head is held to plain float64 and to one process with logits; objectives that are not in the plain reference
to one process. Small chunks: the tiny rows would fit into one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bft_megatron.hf.architectures import read_config
from bft_megatron.objective.view import Geometry
from bft_megatron.run.folder import RunFolder
from bft_megatron.run.prepared import prepare_rows
from examples.objectives import eaft, hard
from tests.helpers.checkpoints import tensors
from tests.helpers.comparing import TOLERANCE, assert_same
from tests.helpers.runs import MODEL, Case, Layout, Result, make_recipe, read_metrics, run, train_rank
from tests.helpers.world import run_world

CHUNKED = ("objective.head=chunked", "objective.chunk_size=24")
EAFT, HARD = Case("examples.objectives.eaft:record"), Case("examples.objectives.hard:record", options="{tau: 2}")


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        (Case("bft"), Layout()),
        (Case(model="qwen3"), Layout(tensor=2)),  # tied to the embedding
        (Case("bft"), Layout(tensor=2, sequence=True, context=2)),
        pytest.param(
            Case("sft", packing=False),
            Layout(tensor=2, sequence=True, pipeline=2, micro_batch_size=2),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_without_logits_as_with_them(
    case: Case,
    layout: Layout,
    data: Path,
    plain: Callable[[Case, int], Result],
    one_process: Callable[[Case], Result],
):
    result = run(make_recipe(data / f"chunked-{case}-{layout}", data, case, layout, 2, *CHUNKED), layout.world)
    assert_same(result, plain(case, 1))
    assert_same(result, one_process(case))


@pytest.mark.parametrize(
    ("case", "overrides"),
    [
        pytest.param(EAFT, (), marks=pytest.mark.slow, id="eaft"),
        pytest.param(EAFT, CHUNKED, marks=pytest.mark.slow, id="eaft-chunked"),
        pytest.param(HARD, CHUNKED, marks=pytest.mark.slow, id="hard-chunked"),
    ],
)
def test_examples_agree_with_one_process(
    case: Case, overrides: tuple[str, ...], data: Path, one_process: Callable[[Case], Result]
):
    layout = Layout(tensor=2, sequence=True, context=2)
    made = make_recipe(data / f"{case}-{len(overrides)}", data, case, layout, 2, *overrides)
    assert_same(run(made, layout.world), one_process(case))


def test_overlapped_communication_changes_neither_losses_nor_what_is_saved(data: Path):
    """Large steps over small buckets, some padded: a weight that is one step old shows in the second loss."""
    overlap = [f"megatron.{flag}" for flag in ("overlap-grad-reduce=true", "overlap-param-gather=true")]
    overlap += ["megatron.ddp-bucket-size=20000"]
    steps = 4
    losses, saved = [], []
    for i, more in enumerate(([], overlap)):
        fixed = ("train.lr=1e-2", f"train.save_every={steps}", *CHUNKED)  # a save would gather all parameters itself
        made = make_recipe(data / f"overlap-{i}", data, Case("bft"), Layout(data=2), steps, *fixed, *more)
        prepared = prepare_rows(made, MODEL, read_config(MODEL).vocab_size)
        run_world(2, train_rank, made, prepared, lambda: None, megatron=True)
        losses.append([line["loss"] for line in read_metrics(RunFolder.of(made).metrics)[0]])
        saved.append(tensors(RunFolder.of(made).checkpoint(steps)))
    assert len(losses[0]) == steps
    assert losses[1] == pytest.approx(losses[0], rel=TOLERANCE)
    assert saved[0].keys() == saved[1].keys()
    assert any(name.startswith("optimizer.state.exp_avg.") for name in saved[0])
    for name, one in saved[0].items():
        if one.is_floating_point():
            assert (one - saved[1][name]).abs().max() <= 1e-3 * one.abs().max(), name


def test_the_examples_weights():
    logp = torch.tensor([-0.5, -3.0, -1e-6, -2.0])
    geometry = Geometry(torch.zeros(4, dtype=torch.int64), torch.tensor([0, 4]), torch.tensor([True]), torch.ones(1))
    view = geometry.view(logp, torch.tensor([0.0, 1.0, 2.0, 9.0]))
    token, sample = eaft.record(gamma=2).weights(view)
    assert token.tolist() == pytest.approx([0, (1 / math.log(20)) ** 2, (2 / math.log(20)) ** 2, 1])
    assert sample.tolist() == [1]
    token, sample = hard.record(tau=2).weights(view)
    assert token.tolist() == pytest.approx(
        [(1 - math.exp(x)) ** 2 for x in (-0.5, -3)] + [1e-12, (1 - math.exp(-2)) ** 2]
    )
    assert sample.tolist() == [1]
