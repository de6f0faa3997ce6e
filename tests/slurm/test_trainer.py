"""The trainer itself under launch/bft_70b.sh: two nodes of four ranks, TP 2 x PP 2 x DP 2, interrupted and not."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from bft_megatron.errors import IN_USE
from tests.helpers.checkpoints import assert_same_tensors
from tests.helpers.commands import ROOT
from tests.helpers.runs import read_metrics
from tests.slurm.cluster import Cluster, ranks, wait_for

STEPS = 6
FIELDS = (
    "device=cpu",
    "parallel.tensor=2",
    "parallel.pipeline=2",
    "train.global_batch_size=4",
    f"train.iterations={STEPS}",
    "train.save_every=2",
    "megatron.distributed-timeout-minutes=1",
)
SECONDS = 500
"""Of a job: eight ranks import Megatron on a few cores, and do so again after each requeue."""


class Job:
    """A run of the tiny recipe: the data in a job of their own, then the ranks."""

    def __init__(self, cluster: Cluster, folder: Path, nodes: int = 2, log: str = "log", prepare: int = 1) -> None:
        self.cluster, self.out, self.log = cluster, folder / "run", folder / log
        script = (ROOT / "launch/bft_70b.sh", f"--nodes={nodes}", "--ntasks-per-node=4", f"--output={self.log}")
        options = {
            "PREPARE": prepare,
            "PREPARE_OPTIONS": "--output=/dev/null",
            "RECIPE": "recipes/tiny.yaml",
            "OMP_NUM_THREADS": 1,
        }
        said = cluster.run(*script, *FIELDS, f"output={self.out}", BFT_HOME=ROOT, **options)
        self.number = said.split()[-1]

    def until_step(self, step: int) -> None:
        wait_for(lambda: self.steps() >= step, SECONDS, f"step {step}")

    def steps(self) -> int:
        path = self.out / "metrics.jsonl"
        return len(read_metrics(path)[0]) if path.exists() else 0

    def finish(self) -> str:
        """Ended well -> what the job said."""
        try:
            job = self.cluster.wait(self.number, SECONDS)
        except TimeoutError as e:
            e.add_note(self.log.read_text() if self.log.exists() else "no log")
            raise
        said = self.log.read_text()
        assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), said
        return said


@pytest.fixture(scope="module")
def whole(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    job = Job(cluster, tmp_path_factory.mktemp("whole"))
    assert "start 1" in job.finish()
    return job.out


def assert_same_run(out: Path, whole: Path) -> None:
    """Every reported number and every tensor of the last checkpoint, bit for bit."""
    assert read_metrics(out / "metrics.jsonl") == read_metrics(whole / "metrics.jsonl")
    last = f"checkpoints/iter_{STEPS:07d}"
    assert_same_tensors(out / last, whole / last)


def test_first_start(whole: Path):
    assert len(read_metrics(whole / "metrics.jsonl")[0]) == STEPS
    assert (whole / "done").exists()


def test_time_limit_near(cluster: Cluster, whole: Path, tmp_path: Path):
    job = Job(cluster, tmp_path)
    job.until_step(3)
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    said = job.finish()
    assert "unfinished (signal SIGUSR1 at step" in said
    assert "start 2" in said
    assert_same_run(job.out, whole)


def test_a_rank_killed_while_it_imports_and_one_that_hangs(cluster: Cluster, whole: Path, tmp_path: Path):
    """SIGKILL before the first step; then a rank stands still, and the others give up after the time-out."""
    job = Job(cluster, tmp_path)
    wait_for(lambda: len(ranks(job.number)) == 8, SECONDS, "the ranks")
    ranks(job.number)[5].kill()
    job.until_step(3)
    ranks(job.number)[2].kill(signal.SIGSTOP)
    said = job.finish()
    assert "rank 5 on" in said
    assert "start 3" in said
    assert_same_run(job.out, whole)


def test_the_same_run_twice(cluster: Cluster, whole: Path, tmp_path: Path):
    """The second job ends before its ranks start, and the first one's run is not disturbed."""
    job = Job(cluster, tmp_path)
    wait_for(lambda: ranks(job.number) and (job.out / "lease").exists(), SECONDS, "the lease of rank 0")
    second = Job(cluster, tmp_path, nodes=1, log="second", prepare=0)
    ended = cluster.wait(second.number, SECONDS)
    said = second.log.read_text()
    assert ended["ExitCode"] == f"{IN_USE}:0", said
    assert f"error: {job.out} is in use by process" in said
    assert f"of Slurm's job {job.number}, since" in said
    assert "start 1" not in said
    assert "start 2" not in job.finish()
    assert_same_run(job.out, whole)
