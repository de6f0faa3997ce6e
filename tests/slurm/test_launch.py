"""What becomes of a job, whatever happens to it: finished, requeued, or failed with the right status, no step lost.

The scripts of launch/ are real, Slurm is real; the ranks are `worker`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bft_megatron.errors import IN_USE
from tests.helpers.commands import ROOT
from tests.slurm.cluster import Cluster, processes_of, ranks, wait_for
from tests.slurm.submitting import Run

SECONDS = 240
LONG = 40
"""Steps of a run that something is to happen to, a tenth of a second each."""


def ended(run: Run, job: str) -> tuple[dict[str, str], str]:
    """What Slurm says of a job when it has ended, and what the job said."""
    try:
        seen = run.cluster.wait(job, SECONDS)
    except TimeoutError as e:
        e.add_note(run.log.read_text() if run.log.exists() else "no log")
        raise
    return seen, run.log.read_text()


def finished(run: Run, job: str, *, steps: int, starts: int) -> None:
    """The job ended well, every step was done and counted once, in so many starts."""
    seen, said = ended(run, job)
    assert (seen["JobState"], seen["ExitCode"]) == ("COMPLETED", "0:0"), said
    assert run.steps == list(range(1, steps + 1)), said
    assert len(run.starts) == starts, said
    assert (run.folder / "done").exists()
    assert not (run.folder / "unfinished").exists()


def failed(run: Run, job: str, status: int) -> str:
    """The job failed with this exit status -> what it said."""
    seen, said = ended(run, job)
    assert (seen["JobState"], seen["ExitCode"]) == ("FAILED", f"{status}:0"), said
    return said


def test_starts_at_the_first_try(run: Run):
    job = run.submit("steps=7")
    finished(run, job, steps=7, starts=1)
    assert run.starts == [[int(job), 8, 0]]


def test_a_finished_run_is_left_alone(run: Run):
    finished(run, run.submit("steps=7"), steps=7, starts=1)
    finished(run, run.submit("steps=7"), steps=7, starts=1)
    assert "is done" in run.log.read_text()


def test_any_recipe(run: Run):
    """bft.sh takes the recipe as its first word."""
    finished(run, run.submit("recipes/tiny.yaml", "steps=3", script="bft.sh"), steps=3, starts=1)


def test_data_prepared_first(run: Run):
    """PREPARE=1, on a login node: a job that packs the data, and the run's own after it."""
    script = (ROOT / "launch/bft_70b.sh", "--nodes=2", "--ntasks-per-node=4", f"--output={run.log}")
    settings = run.settings | {"PREPARE": 1, "PREPARE_OPTIONS": "--output=/dev/null"}
    said = run.cluster.run(*script, "steps=3", f"output={run.folder}", **settings)
    finished(run, said.split()[-1], steps=3, starts=1)
    assert (run.folder / "data/rows").read_text() == "prepared"


def test_a_layout_that_does_not_fit_is_not_submitted(run: Run):
    """PLAN=1, on a login node, by the plan itself."""
    environment = {
        **os.environ,
        "PLAN": "1",
        "PLAN_GPU": "a100-40g",
        "BFT_COMMAND": f"{sys.executable} -m bft_megatron",
    }
    words = [ROOT / "launch/bft_8b.sh", "--nodes=1", f"output={run.folder}"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "not submitted, by the plan above" in done.stderr
    assert "a100-40g" in done.stdout


def test_layers_that_are_not_installed(run: Run):
    """The checks are the command's own: no rank starts, and the error names what installs them."""
    job = run.submit("layers=transformer_engine", BFT_COMMAND=f"{sys.executable} -m bft_megatron")
    said = failed(run, job, 2)
    assert "layers=transformer_engine: Transformer Engine is not installed: launch/install_gpu.sh installs it" in said
    assert "not started, by the checks above" in said
    assert "start 1" not in said
    assert not run.folder.exists()


def warn(cluster: Cluster, job: str) -> None:
    """What `--signal=B:USR1@600` does ten minutes before the time limit."""
    # Its status says nothing: of an array's task it tries again until that has ended, and calls this an error.
    cluster.run("scancel", "--batch", "--signal=USR1", job, check=False)


def test_time_limit_near(run: Run):
    job = run.submit(f"steps={LONG}")
    wait_for(lambda: run.is_at(7), SECONDS, "step 7")
    warn(run.cluster, job)
    finished(run, job, steps=LONG, starts=2)
    assert run.starts[1][2] >= 7
    assert "unfinished (signal SIGUSR1 at step" in run.log.read_text()


def test_signal_while_the_ranks_import(run: Run):
    job = run.submit(f"steps={LONG}", "import_seconds=3")
    wait_for(lambda: (run.folder / "starts").exists() and len(ranks(job)) == 8, SECONDS, "the ranks")
    warn(run.cluster, job)
    finished(run, job, steps=LONG, starts=2)
    assert run.starts[1][2] == 0  # nothing was done before the signal, and nothing was lost
    assert "unfinished (asked to stop before the first step): requeue" in run.log.read_text()
    assert not list((run.folder / "launch").glob("failures.*"))


def test_signal_before_the_ranks(run: Run):
    job = run.submit(f"steps={LONG}", "preflight_seconds=3")
    run.cluster.wait(job, SECONDS, ("RUNNING",))
    wait_for(lambda: run.log.exists(), SECONDS, "the script")
    warn(run.cluster, job)
    finished(run, job, steps=LONG, starts=1)
    assert "asked to stop before the ranks started" in run.log.read_text()


def test_preemption(run: Run):
    """A job of a higher partition takes the nodes: the ranks get TERM, save, and the job comes back."""
    job = run.submit(f"steps={LONG}")
    wait_for(lambda: run.is_at(7), SECONDS, "step 7")
    run.cluster.submit("--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    finished(run, job, steps=LONG, starts=2)
    assert run.starts[1][2] >= 7


def test_preemption_while_the_ranks_import(run: Run):
    """The ranks end at once, and the job comes back; it is no failure of the run."""
    job = run.submit(f"steps={LONG}", "import_seconds=3")
    wait_for(lambda: (run.folder / "starts").exists() and len(ranks(job)) == 8, SECONDS, "the ranks")
    run.cluster.submit("--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    finished(run, job, steps=LONG, starts=2)
    assert run.starts[1][2] == 0
    assert not list((run.folder / "launch").glob("failures.*"))


def test_cancelled_and_submitted_again(run: Run):
    """A person's scancel is not undone; the same command goes on."""
    job = run.submit(f"steps={LONG}")
    wait_for(lambda: run.is_at(7), SECONDS, "step 7")
    run.cluster.run("scancel", job)
    assert run.cluster.wait(job, SECONDS)["JobState"] == "CANCELLED"
    assert (run.folder / "unfinished").read_text().startswith("signal SIGTERM")
    finished(run, run.submit(f"steps={LONG}"), steps=LONG, starts=2)
    assert run.starts[1][2] >= 7


def test_node_lost(run: Run):
    job = run.submit(f"steps={LONG}")
    wait_for(lambda: run.is_at(7), SECONDS, "step 7")
    lost = run.cluster.nodes[1]
    run.cluster.kill_node(lost)
    try:
        finished(run, job, steps=LONG, starts=2)
    finally:
        run.cluster.start_node(lost)
    assert run.starts[1][2] in range(5, LONG, 5)  # a checkpoint; the others take a moment to be ended


@pytest.mark.parametrize("fault", ["fault.3=7@8", "fault.6=kill@8"], ids=["exit 7", "SIGKILL"])
def test_a_rank_is_lost(run: Run, fault: str):
    """The others are ended, the job is tried again, and goes on from its checkpoint."""
    finished(run, run.submit(f"steps={LONG}", fault), steps=LONG, starts=2)
    assert run.starts[1][2] in range(5, LONG, 5)  # a checkpoint; the others take a moment to be ended
    status = 7 if "7@" in fault else 137
    assert (
        f"rank {fault[6]} on {run.cluster.nodes[int(fault[6]) // 4]} ended with status {status}" in run.log.read_text()
    )


def test_a_rank_that_fails_always(run: Run):
    """Three failures without a checkpoint between them are enough."""
    said = failed(run, run.submit("fault.0=kill@2", "fault.times=9"), 75)  # rank 0 counts the steps and saves
    assert "failed 3 times without a new checkpoint" in said
    assert len(run.starts) == 3
    assert not list((run.folder / "lease").iterdir())  # the script gives back what a killed rank 0 held


@pytest.mark.parametrize("status", [2, 65])
def test_a_failure_that_would_come_again(run: Run, status: int):
    """Wrong input and a blow-up are not tried again."""
    said = failed(run, run.submit(f"fault.0={status}@2"), status)
    assert "not tried again" in said
    assert len(run.starts) == 1


def test_ranks_that_end_well_without_their_work(run: Run):
    """A user's code may call exit(0): it is no success, and nothing that a person has seen."""
    said = failed(run, run.submit(*(f"fault.{rank}=0@2" for rank in range(8))), 1)
    assert "the ranks ended well and left" in said
    assert "neither done nor saved" in said


def test_requeue_cap(run: Run):
    job = run.submit(f"steps={LONG}", MAX_REQUEUES=0)
    wait_for(lambda: run.is_at(7), SECONDS, "step 7")
    warn(run.cluster, job)
    assert "after 0 requeues" in failed(run, job, 75)


def test_chain_of_jobs(run: Run):
    """Sites without requeue: an array, one task after the other, each going on where the last one stopped."""
    job = run.submit(f"steps={LONG}", options=["--array=1-3%1"])
    wait_for(lambda: run.is_at(7), SECONDS, "step 7")
    warn(run.cluster, str(run.starts[0][0]))
    wait_for(lambda: not run.cluster.ask("squeue", "--noheader", "--jobs", job), SECONDS, "the array")
    assert run.steps == list(range(1, LONG + 1))
    assert len(run.starts) == 2
    assert "left to the next job of the chain" in run.log.read_text()


def test_two_jobs_of_one_run(run: Run, tmp_path: Path):
    """The later one ends, and costs neither the run nor the other tasks of its array anything."""
    job = run.submit(f"steps={10 * LONG}", options=["--nodes=1"])
    wait_for(lambda: run.is_at(3), SECONDS, "step 3")
    other, before = Run(run.cluster, tmp_path), files(run.folder)
    other.log = tmp_path / "other-%a"
    array = other.submit(f"steps={LONG}", options=["--nodes=1", "--array=1-2%1"])
    wait_for(lambda: not run.cluster.ask("squeue", "--noheader", "--jobs", array), SECONDS, "the array")
    assert run.cluster.job(job)["JobState"] == "RUNNING"
    assert files(run.folder) == before
    for task in ("1", "2"):
        said = (tmp_path / f"other-{task}").read_text()
        assert f"error: {run.folder} is in use by process" in said
        assert f"of Slurm's job {job}, since" in said
        assert run.cluster.job(f"{array}_{task}")["ExitCode"] == f"{IN_USE}:0", said
    run.cluster.run("scancel", job)


def test_two_jobs_that_start_in_the_same_moment(run: Run, tmp_path: Path):
    """Both pass the checks before the ranks; the lease goes to one of them."""
    other = Run(run.cluster, tmp_path)
    other.log = tmp_path / "other"
    fields, settings = (f"steps={3 * LONG}", "preflight_seconds=3"), {"BFT_MEGATRON_LEASE_SECONDS": 24}
    jobs = [r.submit(*fields, options=["--nodes=1"], **settings) for r in (run, other)]
    states = [run.cluster.wait(job, SECONDS)["ExitCode"] for job in jobs]
    assert sorted(states) == ["0:0", f"{IN_USE}:0"], run.log.read_text() + other.log.read_text()
    assert run.steps == list(range(1, 3 * LONG + 1))
    assert len(run.starts) == 1
    assert not list((run.folder / "launch").iterdir())


def test_requeued_to_another_node_without_giving_the_lease_back(run: Run):
    """The job's next start takes its own lease over at once, which would last for most of an hour."""
    job = run.submit(f"steps={LONG}", BFT_MEGATRON_LEASE_SECONDS=3000)
    wait_for(lambda: run.is_at(7), SECONDS, "step 7")
    for process in sorted(processes_of(job), key=lambda p: "slurm_script" not in p.command):  # the script first
        with contextlib.suppress(ProcessLookupError):  # it has ended with another
            process.kill()
    run.cluster.wait(job, SECONDS)
    node = f"nodename={run.cluster.nodes[0]}"
    run.cluster.run("scontrol", "update", node, "state=drain", "reason=lost")
    try:
        run.cluster.run("scontrol", "requeue", job)
        finished(run, job, steps=LONG, starts=2)
    finally:
        run.cluster.run("scontrol", "update", node, "state=resume")
    said = run.log.read_text()
    assert "is free: process" in said
    assert f"on {run.cluster.nodes[0]} of Slurm's job {job}" in said
    assert not (run.folder / "lease").exists()


def files(folder: Path) -> dict[str, int]:
    """When each file of a run that is running was changed, but for those that it appends to and renews."""
    found = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    running = ("metrics.jsonl", "lease/", "checkpoints/")
    return {name: file.stat().st_mtime_ns for name, file in found.items() if not name.startswith(running)}
