"""The weight of the routers' own losses against the objective, known before a step begins.

Megatron adds such a loss for each micro-batch in the backward pass, as a sum over T tokens, and divides all gradients
by the objective's count N at the end of the step. The scale N/T makes the sum a mean over the step's tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from bft_megatron.data.dataset import training_rows
from bft_megatron.objective.records import Reduce
from bft_megatron.processes.device import current_device
from bft_megatron.run.resolved import Run
from bft_megatron.training.datasets import rows_of_step


def loss_scale(run: Run, reduce: Reduce) -> Callable[[int], Tensor]:
    """Return a function: step -> N/T, a scalar on the device.

    N are the step's samples or supervised tokens, by the objective's `reduce`, and T its tokens without padding, all
    counted from the prepared rows.
    """
    rows = training_rows(run.rows.train, seed=run.recipe.train.seed, limit=run.rows.total)
    of_step = rows_of_step(run)

    @lru_cache(1)  # every micro-batch asks
    def of(step: int) -> Tensor:
        counts = rows.counts(of_step(step))
        divisor = counts.samples if reduce == "samples" else counts.supervised
        scale = divisor / max(counts.tokens, 1)  # the validation after the last step asks for a step without rows
        return torch.tensor(scale, device=current_device())

    return of
