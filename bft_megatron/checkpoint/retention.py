"""Deleting old checkpoints: the last few and the best few by a validation metric are kept. Called on rank 0."""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from bft_megatron.checkpoint import integrity
from bft_megatron.run import metrics
from bft_megatron.run.folder import RunFolder

LOWER_IS_BETTER = {"loss", "lm_loss"}


@dataclass(frozen=True)
class Retention:
    """The checkpoints to keep.

    Args:
        last: number of newest ones.
        best: number of best ones besides, by `metric` of the validation at the checkpoint's own step.
        metric: name of a validation metric.
    """

    last: int
    best: int
    metric: str

    def kept(self, whole: list[int], scores: dict[int, float]) -> set[int]:
        """Return which of these iterations are kept; the newest always is."""
        scored = [i for i in whole if i in scores]
        sign = 1 if self.metric in LOWER_IS_BETTER else -1
        best = sorted(scored, key=lambda i: (sign * scores[i], -i))[: self.best]
        return {*sorted(whole)[-max(1, self.last) :], *best}

    def apply(self, folder: RunFolder, *, wait: bool = False) -> list[int]:
        """Delete the others and return their iterations; in the background, so that ranks don't wait for it.

        A checkpoint with missing files or wrong sizes is not counted and not touched, so the only good one is never
        deleted.
        """
        whole = [i for i in folder.iterations() if integrity.damage(folder.checkpoint(i), contents=False) is None]
        gone = sorted(set(whole) - self.kept(whole, _scores(folder.metrics, self.metric)))
        for iteration in gone:
            path = folder.checkpoint(iteration)
            path.rename(path.with_name(f"deleted_{path.name}"))  # a half-deleted one must not pass for a checkpoint
        leftovers = list(folder.checkpoints.glob("deleted_iter_*"))  # including those of a killed process
        deletion = threading.Thread(target=_delete, args=(leftovers,), daemon=True)
        deletion.start()
        if wait:
            deletion.join()
        return gone


def _scores(file: Path, name: str) -> dict[int, float]:
    """Return each iteration's validation metric if it is finite; of a step validated twice, the last line counts."""
    found = {line["iteration"]: line.get(name) for line in metrics.read(file) if line.get("split") == "valid"}
    return {iteration: score for iteration, score in found.items() if isinstance(score, int | float)}


def _delete(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
