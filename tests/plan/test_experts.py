"""What a plan of a mixture of experts says: its memory by the load of the fullest rank."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from bft_megatron.plan import report
from bft_megatron.plan.budget import verdict
from bft_megatron.plan.hardware import Cluster, lookup
from bft_megatron.plan.known import model_config
from bft_megatron.plan.plan import Plan, plan
from bft_megatron.recipe import reader
from bft_megatron.recipe.schema import Recipe
from tests.helpers.commands import ROOT


@pytest.fixture(scope="module")
def made() -> Recipe:
    overrides = [f"model={ROOT / 'recipes' / 'tiny_moe'}", f"data.train={ROOT / 'recipes' / 'tiny' / 'train.jsonl'}"]
    return reader.load(ROOT / "recipes" / "tiny_moe.yaml", [*overrides, "data.valid=null", "data.seq_length=512"])


@pytest.fixture(scope="module")
def planned(made: Recipe) -> Plan:
    two = replace(made, parallel=replace(made.parallel, expert=2))
    return plan(two, model_config(two.model), Cluster(lookup("h100-80g"), 4, 4), 1.5, compare=True)


def test_the_peak_grows_with_the_load(planned: Plan):
    found = report.as_json(planned, [])
    assert found["expert_load"] == 1.5
    assert [entry["load"] for entry in found["by_load"]] == [1, 2, 4]
    peaks = [other.peak for _, other in planned.by_load]
    assert peaks[0] < planned.verdict.peak < peaks[1] < peaks[2]


def test_the_report_says_the_load(planned: Plan):
    text = io.StringIO()
    report.show(planned, Console(file=text, width=200))
    assert "with 1.5 times the mean tokens on the fullest rank; peak by that load: 1: " in text.getvalue()


def test_a_smaller_gpu_does_not_hold_it(planned: Plan):
    small = replace(lookup("h100-80g"), memory=planned.verdict.peak)
    assert verdict(planned.stages, small, 4).answer == "does not fit"
