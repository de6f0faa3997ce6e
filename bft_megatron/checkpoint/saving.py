"""The work after a save: sealing it and, once the next step shows that it is good, deleting older checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from bft_megatron.checkpoint.hf_copies import HFCopies
from bft_megatron.checkpoint.integrity import seal
from bft_megatron.checkpoint.retention import Retention
from bft_megatron.processes import lease
from bft_megatron.run.folder import RunFolder
from bft_megatron.upstream.training_loop import StepEnd


class Saving:
    """The work on the checkpoints after each save.

    A step can leave finite parameters from which no gradient is finite. Its checkpoint must not cost an older one, so
    that retention and the copies wait for the first step from it that is not skipped.

    Args:
        folder: the run's folder.
        keep: the checkpoints to keep.
        copies: the Hugging Face copies, on rank 0 of a run that makes them.
        start: the step that the run starts from.
    """

    def __init__(self, folder: RunFolder, keep: Retention, copies: HFCopies | None, start: int) -> None:
        self.folder, self.keep, self.copies = folder, keep, copies
        self._untried = start > 0  # the process that saved it may have ended before it tried it

    def while_ours[**P](self, allows: Callable[P, bool]) -> Callable[P, bool]:
        """Return a function that asks `allows`, and before that raises InUse on rank 0 if the folder is another's."""

        def allows_ours(*args: P.args, **kwargs: P.kwargs) -> bool:
            if dist.get_rank() == 0:
                lease.check(self.folder.lease)
            return allows(*args, **kwargs)

        return allows_ours

    def saved(self, iteration: int, _seconds: float) -> None:
        """Seal a checkpoint. Collective: the seal's."""
        seal(self.folder.checkpoint(iteration))
        self._untried = True

    def stepped(self, step: StepEnd) -> None:
        """After the first step from a checkpoint with a finite gradient, delete those that are not to be kept."""
        if step.skipped or not self._untried:
            return
        self._untried = False
        if dist.get_rank() == 0:
            self.keep.apply(self.folder)
            if self.copies:
                self.copies.follow()
