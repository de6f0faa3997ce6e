"""What a run that fails or that has to stop says last, and what it leaves."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from bft_megatron.checkpoint.stopping import Stop
from bft_megatron.processes import signals
from bft_megatron.reporting.reporter import Reporter
from bft_megatron.reporting.totals import Meter
from bft_megatron.run.folder import RunFolder
from tests.helpers.background import Run
from tests.helpers.world import run_world


@pytest.mark.slow
def test_exit_after_stops_saved_and_unfinished(tmp_path: Path):
    out = tmp_path / "run"
    with Run(out, "train.iterations=100000", "train.exit_after=0.15", "parallel.tensor=1") as run:
        assert run.end() == 0, run.said
    stopped = re.search(r"exit_after at step (\d+): saved, not finished; the same command goes on", run.said)
    assert stopped
    assert (out / "unfinished").read_text() == f"exit_after at step {stopped[1]}\n"
    assert RunFolder(out).saved_iteration() == int(stopped[1])


def test_exit_after_leaves_time_for_a_step_and_for_a_save_as_long_as_the_longest_so_far(tmp_path: Path):
    assert run_world(2, _asks, tmp_path, megatron=True) == [[False, False, True, False, True]] * 2


def _asks(folder: Path) -> list[bool]:
    """Answers with ten minutes to go: at first, with steps of a second, of nine minutes, and with saves of nine."""
    reporter = Reporter(Meter(), folder / "metrics.jsonl", sys.stdout, "bft", 5)
    ten_minutes = (time.monotonic() - signals.STARTED) / 60 + 10
    stop, answers = Stop(reporter, 5, ten_minutes), []
    for step, save in ((0, 0), (1, 0), (540, 0), (1, 60), (1, 599.5)):
        reporter.step_seconds = step if dist.get_rank() == 0 else 1  # one rank's answer is all ranks'
        stop.saved(0, save)
        answers.append(stop.asked())
        stop.reason = None
    return answers


@pytest.mark.slow
def test_a_failed_rank_says_which_rows_which_checkpoint_and_which_command(tmp_path: Path):
    """Its peer is killed, so its collective fails."""
    out = tmp_path / "run"
    with Run(out, "train.iterations=500", "train.save_every=1") as run:
        ranks = run.until("step     2").ranks()
        os.kill(ranks[1], signal.SIGKILL)
        assert run.end() != 0
    last = run.said.splitlines()[-2:]
    saved = RunFolder(out).saved_iteration()
    assert "rank 1 was killed by SIGKILL" in last
    (line,) = (line for line in last if line.startswith("rank 0: "))
    assert re.search(r"; after step \d+; rows of its micro-batch: \d+ of recipes/tiny/train\.jsonl; ", line)
    assert f"; next start: from the checkpoint of step {saved}; command: bft-megatron train recipes/tiny.yaml " in line
    assert line.endswith(f"(traceback in {out}/logs/rank-00000.log)")
    assert (out / "unfinished").read_text() == "running\n"
