"""Which checkpoints stay: the last few, and the best few by a validation's number. Called on rank 0 after a save."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from bft_megatron.checkpoint import integrity
from bft_megatron.run.folder import RunFolder

LOWER_IS_BETTER = {"loss", "lm_loss"}


@dataclass(frozen=True)
class Retention:
    """What to keep.

    Args:
        last: so many of the newest.
        best: so many of the best besides, by `metric` of the validation at the checkpoint's own step.
    """

    last: int
    best: int
    metric: str

    def kept(self, whole: list[int], scores: dict[int, float]) -> set[int]:
        """Which of these iterations stay; the newest always does."""
        scored = [i for i in whole if i in scores]
        sign = 1 if self.metric in LOWER_IS_BETTER else -1
        best = sorted(scored, key=lambda i: (sign * scores[i], -i))[: self.best]
        return {*sorted(whole)[-max(1, self.last) :], *best}

    def apply(self, folder: RunFolder, *, wait: bool = False) -> list[int]:
        """Delete the others -> their iterations; in the background, where ranks would wait for a terabyte to go.

        A checkpoint that is not whole by its marks and sizes does not count as a newer one and is not touched; so the
        only good one is never deleted.
        """
        whole = [i for i in folder.iterations() if integrity.damage(folder.checkpoint(i), contents=False) is None]
        gone = sorted(set(whole) - self.kept(whole, _scores(folder.metrics, self.metric)))
        for iteration in gone:
            path = folder.checkpoint(iteration)
            path.rename(path.with_name(f"deleted_{path.name}"))  # a half-deleted one must not be taken for one
        leftovers = list(folder.checkpoints.glob("deleted_iter_*"))  # also of a process that was killed meanwhile
        deletion = threading.Thread(target=_delete, args=(leftovers,), daemon=True)
        deletion.start()
        if wait:
            deletion.join()
        return gone


def _scores(metrics: Path, name: str) -> dict[int, float]:
    """Iteration -> its validation's metric, where that is a number; of a step validated twice the last line counts."""
    lines = (json.loads(line) for line in metrics.read_text().splitlines()) if metrics.exists() else ()
    found = {line["iteration"]: line[name] for line in lines if line.get("split") == "valid"}
    return {iteration: score for iteration, score in found.items() if score is not None}


def _delete(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
