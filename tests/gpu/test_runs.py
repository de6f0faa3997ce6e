"""Commands as a user gives them, on one card: a killed run resumes, a run is exported, `check`, the planned peak."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import exported
from tests.helpers.commands import ROOT
from tests.helpers.runs import MODEL, read_metrics

TINY = ["recipes/tiny.yaml", "parallel.data=1"]
SHORT = [*TINY, "train.iterations=6", "train.save_every=2", "train.keep_last=9"]
CLOSE = 1e-3
"""Relative: the atomics of a GPU add in another order each time."""
WIDE = {
    "hidden_size": 2048,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "intermediate_size": 5632,
    "num_hidden_layers": 12,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 49152,
}
"""About 0.7 billion parameters: what a run holds is well above what a GPU takes for itself."""
PEAK_WITHIN = 1.25
"""The ratio between the planned peak and the measured one, either way; the plan's kernels are Transformer Engine's."""


def command(*words: object, limit: float = 240) -> str:
    """Call the command line in a process of its own -> what it printed."""
    line = [sys.executable, "-m", "bft_megatron", *map(str, words)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    command("train", *SHORT, f"output={folder}")
    return folder


def test_a_killed_run_resumes_and_takes_the_same_steps(whole: Path, tmp_path: Path):
    line = [sys.executable, "-m", "bft_megatron", "train", *SHORT, f"output={tmp_path}"]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 180
    while not list(tmp_path.glob("checkpoints/latest_checkpointed_iteration.txt")):
        assert time.monotonic() < deadline, "no checkpoint"
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()  # the ranks end with it
    process.wait()
    command("train", *SHORT, f"output={tmp_path}")
    (found, _), (expected, _) = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path, whole))
    assert [line["iteration"] for line in found] == [1, 2, 3, 4, 5, 6]
    for mine, other in zip(found, expected, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=CLOSE)


def test_an_exported_run_has_every_weight_and_is_scored_the_same(whole: Path, tmp_path: Path):
    command("export", whole, tmp_path / "hf", "--dtype", "float32")
    weights = exported.tensors(tmp_path / "hf")
    assert weights
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    _, before = read_metrics(whole / "metrics.jsonl")
    still = ["init=pretrained", "train.iterations=1", "train.warmup_iterations=0", "train.lr=1e-12", "train.min_lr=0"]
    command("train", *TINY, f"model={tmp_path / 'hf'}", *still, f"output={tmp_path / 'again'}")
    _, after = read_metrics(tmp_path / "again" / "metrics.jsonl")
    assert after[-1]["loss"] == pytest.approx(before[-1]["loss"], rel=CLOSE)


def test_check_finds_the_layout_of_one_card_right(tmp_path: Path):
    command("check", *TINY, f"output={tmp_path}")


def test_the_planned_peak_is_near_the_measured_one(tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | WIDE))
    recipe = [*TINY, f"model={model}", "train.iterations=2", "train.warmup_iterations=0", "data.seq_length=4096"]
    recipe += ["train.precision=bf16", "train.global_batch_size=1", "data.valid=null", f"output={tmp_path / 'run'}"]
    memory = math.floor(torch.cuda.get_device_properties(0).total_memory / 2**30)
    plan = command("plan", *recipe, "--gpu", memory, "--nodes", 1, "--gpus-per-node", 1, "--json")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.json").write_text(plan)
    said = re.search(r"peak memory, on the fullest GPU: (\S+) GiB; (\S+) planned", command("train", *recipe))
    assert said
    measured, planned = map(float, said.groups())
    print(f"measured {measured} GiB, planned {planned} GiB", file=sys.stderr)
    assert 1 / PEAK_WITHIN < measured / planned < PEAK_WITHIN
