"""A signal to any process at any time: it ends at once while there is nothing to save, and from the first step on the
step is finished and saved with status 0; the same command goes on to the same run.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from bft_megatron.processes import signals
from bft_megatron.run.folder import RunFolder
from tests.helpers.background import STEPS, Run, arguments
from tests.helpers.checkpoints import assert_same_tensors
from tests.helpers.commands import ROOT, run_command
from tests.helpers.runs import read_metrics

ALONE = ("parallel.tensor=1", "train.validate_every=null")
"""One rank."""
HEEDS_HUP = ("env", "--default-signal=HUP")
"""Before a command: the tests may run under `nohup`, and a process that ignores a signal hands that on."""


def _unfinished(out: Path) -> str:
    return (out / "unfinished").read_text().strip()


@pytest.mark.slow
def test_runs_that_are_signalled_join_to_one_that_is_not(undisturbed: Path, tmp_path: Path):
    """SIGTERM to one rank in its first milliseconds, SIGUSR1 to the launcher during a step, then to the end."""
    out = tmp_path / "run"
    with Run(out) as run:
        os.kill(run.ranks()[1], signal.SIGTERM)
        assert run.end() == 128 + signal.SIGTERM, run.said
    assert run.said.splitlines()[-1] == "rank 1 was stopped by SIGTERM, before there was anything to save"

    with Run(out) as run:
        run.until("step     2")
        assert _unfinished(out) == "running"
        run.process.send_signal(signal.SIGUSR1)
        assert run.end() == 0, run.said
    stopped_at = int(_unfinished(out).removeprefix("signal SIGUSR1 at step "))
    assert f"signal SIGUSR1 at step {stopped_at}: saved, not finished; the same command goes on" in run.said
    assert 2 <= stopped_at < STEPS
    assert not (out / "done").exists()

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


@pytest.mark.slow
def test_a_first_step_of_days_is_ended_at_once(tmp_path: Path):
    with Run(tmp_path / "run", "train.global_batch_size=2000000000", *ALONE) as run:
        run.until("bft on tiny")
        run.process.send_signal(signal.SIGTERM)
        assert run.end(30) == 128 + signal.SIGTERM
    assert run.said.splitlines()[-1] == "rank 0 was stopped by SIGTERM, before there was anything to save"
    assert _unfinished(tmp_path / "run") == "running"


@pytest.mark.slow
def test_a_closed_terminal_saves_and_stops(tmp_path: Path):
    """The launcher's terminal goes away; what it and the ranks print after that goes nowhere."""
    out = tmp_path / "run"
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [*HEEDS_HUP, sys.executable, "-m", "bft_megatron", *arguments(out, "train.iterations=100000", *ALONE)],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    said = ""
    while "step     2" not in said:
        said += os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert process.wait(60) == 0
    stopped_at = int(_unfinished(out).removeprefix("signal SIGHUP at step "))
    assert RunFolder(out).saved_iteration() == stopped_at


@pytest.mark.slow
def test_what_nohup_has_ignored_stays_ignored_and_ctrl_c_again_ends_a_run_that_cannot_save(tmp_path: Path):
    with Run(tmp_path / "run", "train.iterations=500", prefix=("nohup",)) as run:
        rank, other = run.until("step     1").ranks()
        for pid in (rank, other, run.process.pid):
            os.kill(pid, signal.SIGHUP)
        run.until("step     4")
        os.kill(rank, signal.SIGSTOP)
        while _lives(rank):
            run.process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert run.end() == 128 + signal.SIGKILL
    assert _unfinished(tmp_path / "run") == "running"


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
    ids=lambda number: number.name,
)
def test_a_signal_while_the_data_are_prepared_leaves_nothing(tmp_path: Path, number: signal.Signals):
    lines = (ROOT / "recipes/tiny/train.jsonl").read_text()
    (tmp_path / "data.jsonl").write_text(lines * 2000)
    words = ["prepare", "recipes/tiny.yaml", f"output={tmp_path / 'run'}", f"data.train={tmp_path / 'data.jsonl'}"]
    process = subprocess.Popen(
        [*HEEDS_HUP, sys.executable, "-m", "bft_megatron", *words],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,
    )
    while not list((tmp_path / "run/data").glob(".*")):
        time.sleep(0.01)
    os.killpg(process.pid, number)  # as a terminal does
    assert process.communicate(timeout=60)[0] == f"stopped by {number.name}\n"
    assert process.returncode == 128 + number
    assert list((tmp_path / "run/data").iterdir()) == []


def test_the_workers_of_a_rank_leave_signals_to_it():
    """Slurm signals every process of a step."""
    rank = os.fork()
    if rank == 0:
        signals.listen()
        worker = os.fork()
        if worker == 0:
            for number in signals.ASKING:
                os.kill(os.getpid(), number)
            os._exit(7)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))
    assert os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) == 7


def _lives(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
