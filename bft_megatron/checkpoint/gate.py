"""Deciding whether a step may be saved: what is not finite must never become the newest checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from bft_megatron.checkpoint.streak import ADVICE, Streak
from bft_megatron.errors import BlownUp
from bft_megatron.processes.device import current_device


class Gate:
    """The decision before every save.

    The run's last step is saved within a streak too if a validation vouches for its parameters: they are those of the
    last step that was not skipped. No step follows to try it, so that without a validation its parameters must at least
    have a norm in fp32.

    Args:
        streak: the steps and validations in a row that were not finite.
        steps: the steps of the whole run.
        console: gets a line for each step that is not saved, or is saved within a streak, on rank 0.
    """

    def __init__(self, streak: Streak, steps: int, console: TextIO) -> None:
        self.streak, self.steps, self.console = streak, steps, console
        self.refused: str | None = None
        """Why the last step that was to be saved was not, or None; the same on all ranks."""

    def allows(self, iteration: int, model: Iterable[torch.nn.Module]) -> bool:
        """Return whether a step may be saved, the same on all ranks. Collective over all: a MAX all-reduce of one.

        Args:
            iteration: the step.
            model: this rank's chunks.

        Raises:
            BlownUp: a parameter on some rank is not finite, from which no step recovers; or, after the last step and
                without a validation, the norm of one is not finite in fp32.
        """
        parameters = [p for chunk in model for p in chunk.parameters()]
        last, vouched = iteration == self.steps, self.streak.is_vouched_for
        untried = last and not vouched and not self.streak.why
        bad = (~(have_norms(parameters) if untried else finite(parameters))).int()
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        if bad.item():
            what = "norms of the parameters" if untried else "parameters"
            raise BlownUp(f"{what} are not finite after step {iteration}; {ADVICE}")
        why = self.streak.why
        self.refused = None if last and vouched else why
        if why and dist.get_rank() == 0:
            saved = "not saved" if self.refused else "saved, for a validation of its parameters was finite"
            print(f"step {iteration} is {saved}: {why}", file=self.console, flush=True)
        return self.refused is None

    def check_end(self, iteration: int) -> None:
        """Raise BlownUp if the last step could not be saved."""
        if self.refused:
            raise BlownUp(f"the last step, {iteration}, is not saved: {self.refused}; {ADVICE}")


@torch.no_grad()
def finite(parameters: Iterable[Tensor]) -> Tensor:
    """Return whether all values are finite, as a bool on their device. Does not wait for the device.

    The extremes of a tensor are one reduction, without a temporary copy; they are NaN if any value is.
    """
    extremes = [extreme for p in parameters if p.numel() for extreme in torch.aminmax(p)]
    return torch.stack(extremes).isfinite().all() if extremes else torch.ones((), device=current_device()).bool()


@torch.no_grad()
def have_norms(parameters: Iterable[Tensor]) -> Tensor:
    """Return whether the norm of each is finite in fp32, as a bool on their device. Does not wait for the device."""
    norms = [torch.linalg.vector_norm(p, dtype=torch.float32) for p in parameters if p.numel()]
    return torch.stack(norms).isfinite().all() if norms else torch.ones((), device=current_device()).bool()
