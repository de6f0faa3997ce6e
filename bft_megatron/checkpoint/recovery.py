"""Choosing the checkpoint to resume from: damaged ones are reported and renamed, and the newest intact one is loaded.

Megatron relies on its tracker file alone: an empty one ends the run with status 0, a missing one restarts training from
scratch, and it never falls back to an earlier checkpoint. Here the tracker is a hint, and is corrected.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from bft_megatron.checkpoint import integrity
from bft_megatron.data.folders import damaged_name
from bft_megatron.errors import Unreadable, UserError
from bft_megatron.hf.seal import SEAL
from bft_megatron.processes.device import current_device
from bft_megatron.run.folder import RunFolder

PAUSES = (1, 4, 16)
"""Seconds before each further attempt to read what the file system or a lack of memory did not let us read."""


@dataclass(frozen=True)
class _Found:
    """The state of the folder of checkpoints, as rank 0 sees it."""

    iterations: list[int]
    """Iterations of all checkpoint folders, finished or not, newest first."""
    tracker: int | None
    """The iteration in the tracker file; None if it is missing or unreadable."""
    ever: bool
    """Whether a checkpoint was ever finished here."""


def newest_whole(folder: RunFolder, console: TextIO) -> int:
    """Return the iteration of the newest intact checkpoint, which Megatron will load; 0 if there never was any.

    Collectives over all ranks: a broadcast, a MAX all-reduce for each checkpoint examined, an all-gather for each that
    is not intact, a barrier. Each rank reads its share of the files. Rank 0 renames damaged checkpoints to
    `damaged_iter_*`, removes the remains of an interrupted save, corrects the tracker, and reports this on the console.

    Raises:
        UserError: there were checkpoints and none is intact; nothing is changed in that case.
        Unreadable: on all ranks, if one of them could not read a file for a reason that is not its content, such as an
            error of the file system; nothing is changed in that case.
    """
    rank = dist.get_rank()
    found = _broadcast(_patiently(lambda: _look(folder), folder.tracker) if rank == 0 else None)
    faults: dict[int, str] = {}
    newest = 0
    for iteration in found.iterations:
        fault = _agreed(_examined(folder.checkpoint(iteration)))
        if fault is None:
            newest = iteration
            break
        faults[iteration] = fault
    if not newest and found.ever:
        raise UserError(
            f"holds no whole checkpoint ({_list(faults) or 'the folders are gone'}): put one back, or remove this "
            "folder to train from the start",
            str(folder.checkpoints),
        )
    if rank == 0:
        _set_aside(folder, found, faults, newest, console)
        if newest and not (folder.checkpoint(newest) / SEAL).exists():
            _say_unsealed(newest, console)
    dist.barrier()
    return newest


def _look(folder: RunFolder) -> _Found:
    iterations = sorted(folder.iterations(), reverse=True)
    ever = folder.tracker.exists() or any(map(folder.was_finished, iterations))
    return _Found(iterations, folder.tracked(), ever)


def _examined(path: Path) -> str | Unreadable | None:
    return _patiently(lambda: integrity.damage(path, dist.get_rank(), dist.get_world_size()), path)


def _patiently[T](read: Callable[[], T], path: Path) -> T | Unreadable:
    """Call `read` until it raises no OSError; after the last of PAUSES return what was in the way."""
    for pause in (*PAUSES, None):
        try:
            return read()
        except OSError as e:
            if pause is None:
                return Unreadable(
                    f"rank {dist.get_rank()} cannot read {e.filename or path}: {e.strerror}, in {len(PAUSES) + 1} "
                    f"attempts over {sum(PAUSES):g} seconds; nothing was changed, the same command tries again"
                )
            time.sleep(pause)
    raise AssertionError("the last attempt returns")


def _broadcast(found: _Found | Unreadable | None) -> _Found:
    box = [found]
    dist.broadcast_object_list(box, src=0)
    (sent,) = box
    if isinstance(sent, Unreadable):
        raise sent
    assert sent is not None, "rank 0 has looked"
    return sent


def _agreed(outcome: str | Unreadable | None) -> str | None:
    """Return the fault found by the lowest rank that found one, or None. Collectives: as in `newest_whole`.

    Raises Unreadable on all ranks if any rank has it: what it did not read may be whole.
    """
    bad = torch.tensor(int(outcome is not None), device=current_device())
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    if not bad.item():
        return None
    outcomes: list[str | Unreadable | None] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    for unreadable in outcomes:
        if isinstance(unreadable, Unreadable):
            raise unreadable
    return next(fault for fault in outcomes if isinstance(fault, str))


def _say_unsealed(iteration: int, console: TextIO) -> None:
    print(
        f"the checkpoint of step {iteration} has no {SEAL}: its records match their own checksums, its index has none",
        file=console,
        flush=True,
    )


def _set_aside(folder: RunFolder, found: _Found, faults: dict[int, str], newest: int, console: TextIO) -> None:
    """Rename or remove damaged checkpoints (rank 0): a save into such a folder would mix old and new files."""
    for iteration, fault in faults.items():
        path = folder.checkpoint(iteration)
        cut_short = not folder.was_finished(iteration) and (found.tracker or 0) < iteration
        if cut_short and (found.tracker is not None or not found.ever):
            shutil.rmtree(path)
            print(f"removed what an unfinished save of step {iteration} left behind", file=console, flush=True)
            continue
        aside = path.rename(damaged_name(path))
        print(
            f"checkpoint of step {iteration} is damaged ({fault}): renamed to {aside.name}, using step {newest}",
            file=console,
            flush=True,
        )
    if newest and found.tracker != newest:
        folder.write_tracker(newest)
        named = found.tracker if found.tracker is not None else "none"
        print(
            f"the newest whole checkpoint is that of step {newest}; {folder.tracker.name} named {named}",
            file=console,
            flush=True,
        )


def _list(faults: dict[int, str]) -> str:
    return "; ".join(f"step {iteration}: {fault}" for iteration, fault in faults.items())
