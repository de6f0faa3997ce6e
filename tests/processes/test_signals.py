"""A signal to any rank at any time: the step is finished and saved, status 0, and the same command goes on to the same
run.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.background import STEPS, Run, arguments
from tests.helpers.checkpoints import assert_same_tensors
from tests.helpers.commands import run_command
from tests.helpers.runs import read_metrics


def _unfinished(out: Path) -> str:
    return (out / "unfinished").read_text().strip()


@pytest.mark.slow
def test_runs_that_are_signalled_join_to_one_that_is_not(undisturbed: Path, tmp_path: Path):
    """SIGTERM to one rank in its first milliseconds, SIGUSR1 to the launcher during a step, then to the end."""
    out = tmp_path / "run"
    with Run(out) as run:
        os.kill(run.ranks()[1], signal.SIGTERM)
        assert run.end() == 0, run.said
    assert "signal SIGTERM at step 1: saved, not finished; the same command goes on" in run.said
    assert _unfinished(out) == "signal SIGTERM at step 1"
    assert not (out / "done").exists()

    with Run(out) as run:
        assert _unfinished(out) == "signal SIGTERM at step 1"
        run.until("step     2")
        assert _unfinished(out) == "running"
        run.process.send_signal(signal.SIGUSR1)
        assert run.end() == 0, run.said
    stopped_at = int(_unfinished(out).removeprefix("signal SIGUSR1 at step "))
    assert 2 <= stopped_at < STEPS

    with Run(out) as run:
        assert run.end() == 0, run.said
    assert f"{STEPS} steps from step {stopped_at}" in run.said
    assert (out / "done").exists()
    assert not (out / "unfinished").exists()
    assert read_metrics(out / "metrics.jsonl") == read_metrics(undisturbed / "metrics.jsonl")
    last = f"checkpoints/iter_{STEPS:07d}"
    assert_same_tensors(out / last, undisturbed / last)


@pytest.mark.parametrize("mark", ["unfinished", "done"])
def test_a_run_killed_between_its_last_save_and_its_mark_gets_the_mark(
    undisturbed: Path, mark: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    (undisturbed / "done").rename(undisturbed / "unfinished") if mark == "unfinished" else None
    assert run_command(monkeypatch, *arguments(undisturbed, "train.save_every=2", "train.keep_last=3")) == 0
    assert "step" not in capfd.readouterr().out.replace("last step", "")
    assert (undisturbed / "done").exists()
    assert not (undisturbed / "unfinished").exists()


def test_ctrl_c_again_ends_a_run_that_cannot_save(tmp_path: Path):
    with Run(tmp_path / "run", "train.iterations=500") as run:
        rank = run.until("step     1").ranks()[0]
        os.kill(rank, signal.SIGSTOP)
        while _lives(rank):
            run.process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert run.end() == 128 + signal.SIGKILL
    assert _unfinished(tmp_path / "run") == "running"


def _lives(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
