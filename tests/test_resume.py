"""A run that is killed goes on as if nothing had happened; one that is finished says so; one that is changed is
refused.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing

from tests.layouts.runs import read_metrics
from tests.test_cli import ROOT, command

STEPS = 6
SAVE_EVERY = 2
LAYOUT = ("parallel.tensor=2", "parallel.data=1")


def arguments(out: Path, *overrides: str) -> list[str]:
    steps = [f"train.iterations={STEPS}", f"train.save_every={SAVE_EVERY}", "train.validate_every=3"]
    return ["train", "recipes/tiny.yaml", f"output={out}", *steps, *LAYOUT, *overrides]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = command(*arguments(out))
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_sigkill_and_the_same_command_give_the_same_run_bit_for_bit(whole: Path, tmp_path: Path):
    out = tmp_path / "run"
    _kill_after_step(out, SAVE_EVERY + 1)
    assert _lines(out) > SAVE_EVERY  # steps after the checkpoint were taken, and will be again
    done = command(*arguments(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{STEPS} steps from step" in done.stdout
    assert read_metrics(out / "metrics.jsonl") == read_metrics(whole / "metrics.jsonl")
    resumed, expected = _tensors(out), _tensors(whole)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_adam_has_counted_every_step(whole: Path):
    common = dist_checkpointing.load_common_state_dict(str(whole / "checkpoints" / f"iter_{STEPS:07d}"))
    assert [group["step"] for group in common["optimizer"]["optimizer"]["param_groups"]] == [STEPS] * 2


def test_a_finished_run_says_so(whole: Path):
    before = (whole / "metrics.jsonl").read_bytes()
    done = command(*arguments(whole))
    assert done.returncode == 0
    assert f"finished: {whole} holds the checkpoint of the last step, {STEPS}" in done.stdout
    assert (whole / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("change", ["train.iterations=9", "train.lr=1", "objective.name=sft", "data.seq_length=128"])
def test_another_schedule_objective_or_data_is_refused(whole: Path, change: str):
    done = command(*arguments(whole, change))
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert f"{change}: {whole} holds checkpoints of a run with {change.partition('=')[0]}" in said
    assert "set it back to go on with that run, or choose another output folder" in said


def _kill_after_step(out: Path, step: int) -> None:
    """Start the run, and SIGKILL the launcher when `step` is reported; its ranks must not outlive it."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    words = [sys.executable, "-m", "bft_megatron", *arguments(out)]
    with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if line.startswith("step") and int(line.split()[1].partition("/")[0]) >= step:
                break
        os.kill(run.pid, signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 5
    while subprocess.run(["pgrep", "-f", f"bft_megatron.*{out}"], capture_output=True, check=False).stdout:
        assert time.monotonic() < deadline, "a rank outlived its launcher"
        time.sleep(0.1)


def _lines(out: Path) -> int:
    return len(read_metrics(out / "metrics.jsonl")[0])


def _tensors(out: Path) -> dict[str, Any]:
    """Everything in the last checkpoint: weights and Adam's moments."""
    reader = dcp.FileSystemReader(out / "checkpoints" / f"iter_{STEPS:07d}")
    stored = {k: v for k, v in reader.read_metadata().state_dict_metadata.items() if hasattr(v, "size")}
    tensors = {name: torch.empty(v.size, dtype=v.properties.dtype) for name, v in stored.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
