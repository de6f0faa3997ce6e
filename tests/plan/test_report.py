"""What a plan says, and what it refuses."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from bft_megatron.plan import report
from bft_megatron.plan.budget import PARTS, verdict
from bft_megatron.plan.hardware import Cluster, lookup
from bft_megatron.plan.known import model_config
from bft_megatron.plan.page import page
from bft_megatron.plan.plan import Plan, plan
from bft_megatron.plan.search import candidates
from bft_megatron.recipe import reader
from tests.helpers.commands import ROOT, command

H100 = lookup("h100-80g")


@pytest.fixture(scope="module")
def qwen() -> Plan:
    made = reader.load(ROOT / "recipes" / "qwen3_8b.yaml", ["train.iterations=1000", "train.epochs=null"])
    return plan(made, model_config(made.model), Cluster(H100, 8, 8))


def test_json_holds_the_verdict_and_parts_that_add_up(qwen: Plan):
    said = json.loads(json.dumps(report.as_json(qwen, [])))
    assert said["fits"]
    assert said["parameters"] == pytest.approx(8.19e9, rel=0.01)
    assert said["parts"].keys() == PARTS.keys()
    assert sum(said["parts"].values()) == pytest.approx(said["peak_gib"], abs=0.01)
    assert said["estimate"]["days"] == pytest.approx(said["estimate"]["seconds"] * 1000 / 86400)


def test_a_smaller_gpu_is_another_verdict(qwen: Plan):
    peak = qwen.verdict.peak
    assert [verdict(qwen.stages, replace(H100, memory=peak + more), 8).answer for more in (0.9, 1.5, 3.5)] == [
        "does not fit",
        "tight",
        "fits",
    ]


def test_the_report_names_what_the_gpu_has_and_that_times_are_estimates(qwen: Plan):
    text = io.StringIO()
    report.show(qwen, Console(file=text, width=120))
    assert "of 79.1 GiB" in text.getvalue()
    assert "an estimate, not measured" in text.getvalue()


def test_the_page_draws_every_part_of_every_stage(qwen: Plan):
    drawn = page(qwen)
    assert drawn.count("<polygon") == len(PARTS) * len(qwen.stages)
    assert "http" not in drawn


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gpu", "h300"], "h300: no GPU is known by this name"),
        (["--nodes", "3"], "train.global_batch_size: 32 is not a multiple"),
        (["parallel.tensor=3"], "parallel.tensor=3: 3 does not divide"),
        (["model=nobody/knows-this"], "model: nobody/knows-this: no such folder"),
    ],
)
def test_refusals(options: list[str], says: str, tmp_path: Path):
    done = command("plan", str(ROOT / "recipes" / "qwen3_8b.yaml"), *options)
    assert done.returncode == 2
    assert says in done.stderr


def test_a_search_reads_flags_whatever_their_spelling():
    """Full recomputation keeps no activations of layers, so longer rows fit on more layouts."""

    def layouts(*overrides: str) -> int:
        rows = ["train.iterations=1000", "train.epochs=null", "data.seq_length=32768"]
        made = reader.load(ROOT / "recipes" / "qwen3_8b.yaml", [*rows, *overrides])
        return len(list(candidates(made, model_config(made.model), Cluster(H100, 8, 8))))

    underscored, dashed = (
        layouts(f"megatron.{flag}=full") for flag in ("recompute_granularity", "recompute-granularity")
    )
    assert underscored == dashed > layouts()
