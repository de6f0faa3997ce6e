"""Deciding when to save and stop early: on a signal to any rank, or before `train.exit_after` would be exceeded."""

from __future__ import annotations

import signal
import time

import torch
import torch.distributed as dist

from bft_megatron.processes import signals
from bft_megatron.processes.device import current_device
from bft_megatron.reporting.reporter import Reporter


class Stop:
    """The decision after every step whether to save and stop there.

    Args:
        reporter: knows the current step and its duration.
        last: the run's last step, after which there is nothing to stop.
        exit_after: minutes from the start of the process by which it must have saved and ended, or None.
    """

    def __init__(self, reporter: Reporter, last: int, exit_after: float | None) -> None:
        self.reporter, self.last, self.exit_after = reporter, last, exit_after
        self.reason: str | None = None
        """Why this process stops before the last step, once it does; the same on all ranks."""
        self._save_seconds = 0.0

    def saved(self, _: int, seconds: float) -> None:
        """Note the duration of a save, because the last one before `exit_after` may take as long."""
        self._save_seconds = max(self._save_seconds, seconds)

    def asked(self) -> bool:
        """Return whether to save and stop now, the same on all ranks. Collective over all: a MAX all-reduce of two."""
        step = self.reporter.iteration
        if step >= self.last:
            return False
        asked = torch.tensor([signals.received(), self._late()], device=current_device())
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        number, late = asked.tolist()
        if number or late:
            self.reason = f"{f'signal {signal.Signals(number).name}' if number else 'exit_after'} at step {step}"
        return self.reason is not None

    def _late(self) -> bool:
        """Return whether one more step and a save (before the first save: a second step) would exceed `exit_after`."""
        if self.exit_after is None:
            return False
        step = self.reporter.step_seconds
        return time.monotonic() - signals.STARTED + step + (self._save_seconds or step) > 60 * self.exit_after
