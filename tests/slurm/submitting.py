"""A run of a stand-in for the trainer, submitted to a cluster as a user would."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tests.helpers.commands import ROOT
from tests.slurm.cluster import Cluster

WORKER = f"{sys.executable} {Path(__file__).with_name('worker.py')}"


class Run:
    """A run of the stand-in for the trainer (`worker`), two nodes of four tasks, submitted as a user would."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder, self.log = cluster, folder / "run", folder / "log"
        self.settings = {"BFT_COMMAND": WORKER, "RECIPE": "recipes/tiny.yaml", "PYTHONPATH": ROOT, "BFT_HOME": ROOT}

    def submit(self, *fields: str, options: Sequence[str] = (), script: str = "bft_70b.sh", **variables: object) -> str:
        """sbatch OPTIONS launch/SCRIPT FIELDS -> the job's number."""
        sizes = ("--nodes=2", "--ntasks-per-node=4", f"--output={self.log}", f"--chdir={ROOT}")
        words = (*sizes, *options, ROOT / "launch" / script, *fields, f"output={self.folder}")
        return self.cluster.submit(*words, **self.settings | variables)

    @property
    def steps(self) -> list[int]:
        """What was trained and not thrown away."""
        return [int(line) for line in (self.folder / "metrics.jsonl").read_text().split()]

    @property
    def starts(self) -> list[list[int]]:
        """[job, ranks, first step] of every start."""
        return [[int(word) for word in line.split()] for line in (self.folder / "starts").read_text().splitlines()]

    def is_at(self, step: int) -> bool:
        """Whether it has come to a step."""
        return (self.folder / "metrics.jsonl").exists() and len(self.steps) >= step
