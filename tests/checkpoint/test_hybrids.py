"""A run of a hybrid goes on on any layout: in bf16, where some of its parameters are fp32, on the same to the bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from tests.helpers.background import Run
from tests.helpers.checkpoints import assert_same_tensors
from tests.helpers.resuming import Resuming
from tests.helpers.runs import Layout, read_metrics, write_data

ONE, DP2 = Layout(), Layout(data=2)
TP2 = Layout(tensor=2, sequence=True)
TP2_CP2 = Layout(tensor=2, context=2)
VPP2 = Layout(pipeline=2, virtual_pipeline=2)
TP2_EP2 = Layout(tensor=2, sequence=True, expert=2)
DP2_EP2 = Layout(data=2, expert=2)
HYBRID, MIXTURE, NEXT = "hybrid", "hybrid_moe", "next"
BF16 = ("train.precision=bf16",)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hybrids")
    write_data(folder)
    return folder


def _check_bits(runs: Resuming, layout: Layout, folder: Path) -> None:
    whole, expected = runs.undisturbed(layout)
    runs.check_bits(whole, expected, layout, folder)


def test_a_resumed_run_in_bf16_is_the_same_to_the_bit(data: Path, tmp_path: Path):
    runs = Resuming(data, HYBRID, BF16, steps=2)
    _check_bits(runs, DP2, tmp_path / "run")
    stored = runs.last_tensors(runs.undisturbed(DP2)[0])
    kept = {x.dtype for name, x in stored.items() if "A_log" in name or "out_norm" in name}
    assert kept == {torch.float32}
    assert {x.dtype for name, x in stored.items() if "in_proj" in name} == {torch.bfloat16, torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", [TP2, TP2_CP2, VPP2], ids=str)
def test_other_layouts_go_on_to_the_bit(data: Path, tmp_path: Path, layout: Layout, words: tuple[str, ...]):
    _check_bits(Resuming(data, HYBRID, words), layout, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("model", "layout"), [(MIXTURE, TP2_EP2), (MIXTURE, DP2_EP2), (NEXT, TP2_EP2)], ids=str)
def test_mixtures_in_bf16_go_on_to_the_bit(data: Path, tmp_path: Path, model: str, layout: Layout):
    _check_bits(Resuming(data, model, BF16), layout, tmp_path / "run")


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_bit(tmp_path: Path):
    words = ["model=recipes/tiny_hybrid", "train.precision=bf16", "train.save_every=2", "train.keep_last=3"]
    with Run(tmp_path / "whole", *words) as run:
        assert run.end() == 0, run.said
    with Run(tmp_path / "killed", *words) as run:
        _, rank = run.ranks()
        run.until("step     3")
        os.kill(rank, signal.SIGKILL)
        assert run.end() == 128 + signal.SIGKILL, run.said
    with Run(tmp_path / "killed", *words) as run:
        assert run.end() == 0, run.said
    assert "steps from step 2" in run.said
    assert read_metrics(tmp_path / "killed" / "metrics.jsonl") == read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert_same_tensors(*(tmp_path / name / "checkpoints" / "iter_0000006" for name in ("killed", "whole")))


def test_a_process_goes_on_with_what_two_saved(data: Path, tmp_path: Path):
    Resuming(data, HYBRID, steps=2).check(TP2, ONE, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "first", "then"),
    [
        *((HYBRID, TP2, then) for then in (DP2, VPP2, TP2_CP2, Layout(context=2, data=2), Layout(pipeline=2, data=2))),
        *((HYBRID, first, TP2) for first in (ONE, VPP2, Layout(context=2))),
        (MIXTURE, ONE, DP2_EP2),
        (MIXTURE, DP2_EP2, TP2_EP2),
        (MIXTURE, TP2_EP2, Layout(pipeline=2, data=2, expert=2)),
        (MIXTURE, DP2_EP2, Layout(context=2, data=2, expert=4)),
        (NEXT, TP2_EP2, VPP2),
        (NEXT, DP2_EP2, TP2),
    ],
    ids=str,
)
def test_another_layout_goes_on_with_the_same_numbers(
    data: Path, tmp_path: Path, model: str, first: Layout, then: Layout
):
    Resuming(data, model).check(first, then, tmp_path / "run")
