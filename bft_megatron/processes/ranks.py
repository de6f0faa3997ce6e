"""This process's rank in its job, from the variables that torchrun, the Slurm scripts and `processes.launcher` set.

Imports no torch, because a rank needs its number before it imports anything slow.
"""

from __future__ import annotations

import os

from bft_megatron.errors import UserError

VARIABLES = frozenset({"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"})
"""Environment variables that describe a rank."""


def in_rank() -> bool:
    """Return whether this process is a rank of a job, whichever launcher started it."""
    return "RANK" in os.environ


def check() -> None:
    """Check the variables of a rank.

    Raises:
        UserError: one of them is no number.
    """
    rank(), world_size(), local_rank(), local_world_size()


def rank() -> int:
    """Return the rank of this process in the job; 0 outside a job."""
    return _number("RANK", "0")


def leads() -> bool:
    """Return whether this process says what all ranks meet alike: rank 0, or one whose number cannot be read."""
    try:
        return rank() == 0
    except UserError:
        return True


def world_size() -> int:
    """Return the number of processes in the job; 1 outside a job."""
    return _number("WORLD_SIZE", "1")


def local_rank() -> int:
    """Return the rank of this process on its machine; 0 outside a job."""
    return _number("LOCAL_RANK", "0")


def local_world_size() -> int | None:
    """Return the number of the job's processes on this machine; None if the launcher does not set it."""
    return _number("LOCAL_WORLD_SIZE", "") if "LOCAL_WORLD_SIZE" in os.environ else None


def as_rank(rank: int, processes: int) -> dict[str, str]:
    """Return this process's environment for a child that is a rank of a job on this machine alone."""
    own, size = str(rank), str(processes)
    return {**os.environ, "RANK": own, "LOCAL_RANK": own, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}


def as_no_rank() -> dict[str, str]:
    """Return this process's environment for a child that is not a rank of the job."""
    return {name: value for name, value in os.environ.items() if name not in VARIABLES}


def _number(variable: str, default: str) -> int:
    text = os.environ.get(variable, default)
    if not (text.isascii() and text.isdigit()):
        raise UserError(
            f"must be a whole number, not {text!r}: a job's launcher sets it", f"environment variable {variable}"
        )
    return int(text)
