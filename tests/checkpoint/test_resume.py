"""A run that is killed goes on as if nothing had happened; one that is finished says so; one that is changed is
refused.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from megatron.core import dist_checkpointing

from bft_megatron.run.folder import RunFolder
from tests.checkpoint.soak import differences, finish, kill_once, overrides
from tests.helpers.background import STEPS, Run, arguments
from tests.helpers.commands import command


@pytest.mark.slow
def test_a_run_whose_processes_are_killed_ends_with_the_same_bits(undisturbed: Path, tmp_path: Path):
    """A rank in a save, then the launcher; `make soak` kills thirty ranks."""
    out = tmp_path / "killed"
    kill = kill_once(out, STEPS, "in a save", random.Random(4))
    assert kill is not None
    _kill_the_launcher(out)
    finish(out, STEPS)
    assert differences(out, undisturbed, STEPS) == []


def _kill_the_launcher(out: Path) -> None:
    """After the first step that is reported; its ranks must not outlive it."""
    with Run(out, *overrides(STEPS)) as run:
        ranks = run.until("step ").ranks()
        run.process.kill()
        deadline = time.monotonic() + 30
        while any(_command(pid) for pid in ranks):
            assert time.monotonic() < deadline, "a rank outlived its launcher"
            time.sleep(0.05)


def _command(pid: int) -> bytes:
    """Empty of a process that has ended and that nobody asked for its status."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_adam_has_counted_every_step(undisturbed: Path):
    common = dist_checkpointing.load_common_state_dict(str(RunFolder(undisturbed).checkpoint(STEPS)))
    assert [group["step"] for group in common["optimizer"]["optimizer"]["param_groups"]] == [STEPS] * 2


def test_a_finished_run_says_so(undisturbed: Path):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    done = command(*arguments(undisturbed))
    assert done.returncode == 0
    assert f"finished: {undisturbed} holds the checkpoint of the last step, {STEPS}" in done.stdout
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("change", ["train.iterations=9", "train.lr=1", "objective.name=sft", "data.seq_length=128"])
def test_another_schedule_objective_or_data_is_refused(undisturbed: Path, change: str):
    done = command(*arguments(undisturbed, change))
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert f"{change}: {undisturbed} holds checkpoints of a run with {change.partition('=')[0]}" in said
    assert "set it back to go on with that run, or choose another output folder" in said
