"""One cluster of three nodes for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, running
from tests.slurm.submitting import Run


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with running(nodes=3) as made:
        yield made


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path) -> Run:
    return Run(cluster, tmp_path)
