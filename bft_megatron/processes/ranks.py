"""Which rank of a job this process is, by the variables that torchrun, Slurm's scripts and our launcher set.

No torch: a rank asks before it imports anything slow.
"""

from __future__ import annotations

import os

VARIABLES = frozenset({"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"})


def in_rank() -> bool:
    """Whether this process is one of a job's ranks, whoever started it."""
    return "RANK" in os.environ


def rank() -> int:
    """This process among all of the job; 0 outside a job."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes of the job; 1 outside a job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process among those of its machine; 0 outside a job."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int | None:
    """Processes of the job on this machine; None where who started them does not say."""
    size = os.environ.get("LOCAL_WORLD_SIZE")
    return None if size is None else int(size)


def as_rank(rank: int, processes: int) -> dict[str, str]:
    """The environment of this process, for a child that is a rank of a job on this machine alone."""
    own, size = str(rank), str(processes)
    return {**os.environ, "RANK": own, "LOCAL_RANK": own, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}


def as_no_rank() -> dict[str, str]:
    """The environment of this process, for a child that is no rank of its job."""
    return {name: value for name, value in os.environ.items() if name not in VARIABLES}
