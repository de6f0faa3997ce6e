"""Parts of the GPU's benchmarks: kept in one file, taken up where they stopped, drawn as tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as bench
from benchmarks.gpu import head, train
from benchmarks.gpu.parts import Part, Results, measure

MACHINE = {"card": "a card", "driver": "1", "torch": "2", "triton": "3", "source": "abc"}
SCRIPT = """
import json, pathlib, sys, time
folder, what, _, file = sys.argv[1:]
runs = pathlib.Path(folder, what)
runs.write_text(runs.read_text() + "x" if runs.exists() else "x")
if what == "slow":
    time.sleep(60)
if what == "failing" and len(runs.read_text()) == 1:
    sys.exit(3)
pathlib.Path(file).write_text(json.dumps({"ms": len(what)}))
"""


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Part]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return {name: Part(name, [str(script), str(tmp_path), name]) for name in ("good", "failing", "slow")}


def test_a_second_call_measures_what_is_missing(parts: dict[str, Part], tmp_path: Path):
    file = tmp_path / "found" / "results.json"
    chosen = [parts["failing"], parts["good"]]
    assert measure(chosen, Results(file, MACHINE)) == {"failing": "ended with status 3"}
    assert measure(chosen, Results(file, MACHINE)) == {}
    assert ((tmp_path / "good").read_text(), (tmp_path / "failing").read_text()) == ("x", "xx")
    results = Results(file, MACHINE)
    assert [results.of(part) for part in chosen] == [{"ms": 7}, {"ms": 4}]
    assert [line["part"] for line in json.loads(file.read_text())] == ["good", "failing"]


@pytest.mark.parametrize("changed", MACHINE)
def test_another_card_or_version_or_source_is_measured_anew(changed: str, parts: dict[str, Part], tmp_path: Path):
    file = tmp_path / "results.json"
    Results(file, MACHINE).add(parts["good"], {"ms": 1}, 2.0)
    assert Results(file, MACHINE).of(parts["good"]) == {"ms": 1}
    assert Results(file, MACHINE | {changed: "other"}).of(parts["good"]) is None
    assert Results(file, MACHINE).of(Part("good", ["another question"])) is None


def test_a_part_past_its_time_is_ended_and_said(parts: dict[str, Part], tmp_path: Path):
    failed = measure([parts["slow"]], Results(tmp_path / "results.json", MACHINE), limit=1)
    assert failed == {"slow": "ran past 1 s"}
    assert not (tmp_path / "results.json").exists()


def test_the_page_has_each_part_once_and_says_what_is_missing(tmp_path: Path):
    """Numbers of one head's part and one model's, by hand; the others are missing."""
    results = Results(tmp_path / "results.json", MACHINE)
    cases, models = ([part for part in bench.PARTS if part.words[1].endswith(kind)] for kind in ("head", "train"))
    heads = {
        head.peers.BASELINE: {"ms": 20.0, "MiB": 6000.0, "share": 0.1},
        "ours, over logits, Triton": {"ms": 5.0, "MiB": 2000.0, "share": 0.4},
        "Liger": {"failed": "ImportError: none"},
    }
    errors = {"ours, over logits, Triton": {"log p": 1e-8, "gradient": 1e-3}}
    found = {
        "limits": {"copy": 4e12, "product": 8e14},
        "cases": {cases[0].words[2]: {"heads": heads, "errors": errors}},
    }
    results.add(cases[0], found, 100.0)
    step = {"ms": {"bft": 500.0}, "tokens": 32768, "GiB": 40.0, "flops": 2e14, "product": 8e14, "peak": 1e15}
    results.add(models[0], {models[0].words[2]: step}, 100.0)
    (launches,) = (part for part in bench.PARTS if part.words[1].endswith("blocks"))
    times = {"4096 x 4": 2.0, "8192 x 8": 1.5}
    results.add(launches, {"copy": 4e12, "in use": "4096 x 4", "columns": {"128256": times}}, 9.0)
    page = bench.page(results, {models[1].name: "ran past 480 s"})
    assert "a card" in page
    assert "| ours, over logits, Triton | 5.00 | 0.25x | 40% | 2,000 | 1.0e-08 | 1.0e-03 |" in page
    assert "| Liger | ImportError: none |" in page
    assert f"| {models[0].words[2]} | bft | 500 | 65,536 | 40% | 50% | 40.0 |" in page
    assert f"{models[1].name}: ran past 480 s" in page
    assert "| 128,256 | 4096 x 4 | 2.00 | 39% | 8192 x 8 | 1.50 |" in page
    rest = [part for part in bench.PARTS if part not in (cases[0], launches, *models[:2])]
    assert all(page.count(f"{part.name}: not measured") == 1 for part in rest)


def test_the_parts_name_cases_and_models_that_there_are():
    names = [part.name for part in bench.PARTS]
    assert len({*names}) == len(names)
    for part in bench.PARTS:
        assert part.words[2:3] == [] or part.words[2] in (*head.CASES, *train.MODELS)
