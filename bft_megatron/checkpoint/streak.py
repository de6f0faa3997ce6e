"""Counting the steps and validations in a row that are not finite, over the starts of a run, and giving up in the end.

Nothing is saved within such a streak, so the next start repeats it from the last checkpoint. A run that is stopped
again and again within it would never end: `record` hands the counts to the next start, and a save clears them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from bft_megatron.errors import BlownUp
from bft_megatron.processes.device import current_device
from bft_megatron.reporting.totals import Totals
from bft_megatron.run import atomic
from bft_megatron.run.folder import RunFolder
from bft_megatron.upstream.training_loop import StepEnd

MAX_VALIDATIONS = 2
"""Validations in a row that may fail to be finite before a run gives up."""

_LIMIT = 1 << 31
"""No run has as many steps, and a larger number may not fit into a tensor."""

ADVICE = "lower train.lr (in another output folder), or look at the rows and at the objective"


@dataclass(frozen=True)
class Record:
    """The counts of a process that stopped unsaved."""

    start: int
    """The step that the next one starts from."""
    stopped: int
    """The step after which it stopped."""
    skipped: int = 0
    validations: int = 0


class Streak:
    """The running streak: skipped steps and non-finite validations in a row. The same on all ranks.

    Args:
        folder: the run's folder; the record is its `streak.json`.
        start: the step that the run starts from.
        max_skipped: skipped steps in a row after which the run gives up.
        totals: returns the totals of the last validation, on the last pipeline stage.

    Creating it is collective over all ranks: a broadcast of the record, which rank 0 reads.
    """

    def __init__(self, folder: RunFolder, start: int, max_skipped: int, totals: Callable[[], Totals]) -> None:
        self.file, self.start, self.max_skipped, self.totals = folder.root / "streak.json", start, max_skipped, totals
        self.skipped = 0
        """Skipped steps in a row of this process."""
        self.validations = 0
        """Non-finite validations in a row of this process."""
        self.before = _broadcast(_read(self.file, start) if dist.get_rank() == 0 else Record(start, start))
        """The record of the process before, if its last checkpoint is the one that this process starts from."""
        self.last = start
        """The step before the streak: the last that was not skipped."""
        self._began, self._validated = start, -1

    def stepped(self, step: StepEnd) -> None:
        """Count a step.

        Raises:
            BlownUp: too many steps in a row were skipped.
        """
        if not step.skipped:
            self.skipped, self.last = 0, step.iteration
            if step.iteration >= self.before.stopped:  # this process is past the streak of the one before
                self.before = replace(self.before, skipped=0)
            return
        self.skipped += 1
        if self.skipped + self.before.skipped >= self.max_skipped:
            raise BlownUp(f"{self._why_skipped}; {ADVICE}")

    def validated(self, iteration: int) -> None:
        """Count a validation. Collective over all ranks: a MAX all-reduce of one number.

        Raises:
            BlownUp: the one before the first step was not finite, or too many in a row.
        """
        # Without a token the means are NaN, and the sums are 0.
        bad = torch.tensor(not all(map(math.isfinite, self.totals().sums.values())), device=current_device()).int()
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        self.validations = self.validations + 1 if bad.item() else 0
        if not self.validations:
            self._validated = iteration
            if iteration >= self.before.stopped:
                self.before = replace(self.before, validations=0)
        if self.validations and (iteration == 0 or self.validations + self.before.validations >= MAX_VALIDATIONS):
            raise BlownUp(f"{self._why_validations}; {ADVICE}")

    @property
    def why(self) -> str | None:
        """Why no step may be saved, or None."""
        if self.skipped:
            return self._why_skipped
        return self._why_validations if self.validations else None

    @property
    def _why_skipped(self) -> str:
        return f"the gradient of {_in_a_row('step', self.skipped, self.before.skipped)} was not finite"

    @property
    def _why_validations(self) -> str:
        return f"the loss of {_in_a_row('validation', self.validations, self.before.validations)} was not finite"

    @property
    def is_vouched_for(self) -> bool:
        """Whether this process has learned something, and a validation of the parameters as they are was finite."""
        return self._validated >= self.last > self._began

    def saved(self, iteration: int, _seconds: float) -> None:
        """Forget the record: the next start begins from this step."""
        self.start, self.before = iteration, Record(iteration, iteration)
        if dist.get_rank() == 0:
            self.file.unlink(missing_ok=True)

    def record(self) -> None:
        """Write the counts for the next start, atomically, on rank 0. Call it in a process that stops unsaved."""
        if dist.get_rank() != 0:
            return
        skipped, validations = self.skipped + self.before.skipped, self.validations + self.before.validations
        record = Record(self.start, self.last + self.skipped, skipped, validations)
        atomic.write(self.file, json.dumps(asdict(record)))


def _in_a_row(what: str, here: int, before: int) -> str:
    """Return a phrase such as `3 steps in a row (2 of them before this start)`."""
    if here + before == 1:
        return f"the last {what}"
    return f"{here + before} {what}s in a row" + (f" ({before} of them before this start)" if before else "")


def _read(file: Path, start: int) -> Record:
    """Return the record for a start from this step; one of nothing if there is none."""
    try:
        found = Record(**{name: int(value) for name, value in json.loads(file.read_text()).items()})
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return Record(start, start)  # a damaged record loses the counts and nothing else
    sound = found.start == start and all(0 <= value < _LIMIT for value in asdict(found).values())
    return found if sound else Record(start, start)


def _broadcast(record: Record) -> Record:
    sent = torch.tensor(list(asdict(record).values()), device=current_device())
    dist.broadcast(sent, src=0)
    return Record(*sent.tolist())
