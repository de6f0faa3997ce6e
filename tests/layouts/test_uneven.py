"""Layers that the pipeline does not divide, by the flags that the refusal of such a layout advises."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bft_megatron.errors import FieldError
from tests.helpers import model_reference as reference
from tests.helpers.comparing import assert_same
from tests.helpers.runs import MODEL, Case, Layout, make_recipe, run

PIPELINE = Layout(pipeline=2)


@pytest.fixture(scope="module")
def five_layers(data: Path) -> str:
    shutil.copytree(MODEL, data / "five")
    config = json.loads((MODEL / "config.json").read_text())
    (data / "five" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    return "five"


def test_five_layers_on_two_stages(data: Path, five_layers: str):
    case = Case(model=five_layers)
    with pytest.raises(
        FieldError, match="set `account-for-embedding-in-pipeline-split` or `decoder-first-pipeline-num-"
    ):
        make_recipe(data / "uneven", data, case, PIPELINE, 1)
    for advised in ("decoder-first-pipeline-num-layers=3", "account-for-embedding-in-pipeline-split=true"):
        made = make_recipe(data / advised.partition("=")[0], data, case, PIPELINE, 1, f"megatron.{advised}")
        assert_same(run(made, PIPELINE.world), reference.first_step(made, 1))


def test_layers_of_two_kinds(data: Path):
    """Three gated delta nets on the first stage; attention and another net on the second."""
    kinds = ["linear_attention"] * 3 + ["full_attention", "linear_attention"]
    shutil.copytree(data / "hybrid", data / "five_of_two")
    config = json.loads((data / "hybrid" / "config.json").read_text())
    config |= {"num_hidden_layers": 5, "layer_types": kinds}
    (data / "five_of_two" / "config.json").write_text(json.dumps(config))
    first = "megatron.decoder-first-pipeline-num-layers=3"
    made = make_recipe(data / "two-kinds", data, Case(model="five_of_two"), PIPELINE, 1, first)
    assert_same(run(made, PIPELINE.world), reference.first_step(made, 1))
