"""One run killed again and again, SIGKILL to a random rank at a random moment, held to the same run left alone.

    python -m tests.checkpoint.soak --kills 30

prints a line a kill and ends with status 0 where the last weights, Adam's moments and all metrics are the same bits.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bft_megatron.run.folder import RunFolder
from tests.helpers.background import WORLD, Run
from tests.helpers.checkpoints import tensors
from tests.helpers.runs import read_metrics

MOMENTS = ("starting", "in a step", "in a step", "in a save", "in a save")


@dataclass(frozen=True)
class Kill:
    """One of them, and what it left."""

    moment: str
    rank: int
    reported: int
    """Steps that had been reported."""
    saved: int
    """Of the newest checkpoint that was saved to its end."""
    torn: bool
    """Whether a half-written checkpoint was left."""


def overrides(steps: int) -> tuple[str, ...]:
    """A checkpoint a step, so that about half of the time is spent saving."""
    return (f"train.iterations={steps}", "train.save_every=1")


def kill_once(out: Path, steps: int, moment: str, rng: random.Random) -> Kill | None:
    """Start or go on with the run and kill a rank; None where the run ended before that."""
    folder, rank = RunFolder(out), rng.randrange(WORLD)
    with Run(out, *overrides(steps)) as run:
        pid = run.ranks()[rank]
        if moment == "starting":
            time.sleep(rng.uniform(0, 6))
        else:
            run.until("step ")
            if moment == "in a step":
                time.sleep(rng.uniform(0, 1))
            else:
                _wait_for_a_save(folder, run)
                time.sleep(rng.uniform(0, 0.3))
        if run.process.poll() is not None:
            return None
        os.kill(pid, signal.SIGKILL)
        if run.end() == 0:
            return None
    lines = read_metrics(folder.metrics)[0] if folder.metrics.exists() else []
    torn = any(not (folder.checkpoint(i) / "metadata.json").exists() for i in folder.iterations())
    return Kill(moment, rank, len(lines), folder.saved_iteration(), torn)


def _wait_for_a_save(folder: RunFolder, run: Run) -> None:
    """Until a checkpoint's folder is there and not complete, or the run has ended."""
    while run.process.poll() is None:
        if any(not (folder.checkpoint(i) / "metadata.json").exists() for i in folder.iterations()):
            return
        time.sleep(0.001)


def finish(out: Path, steps: int) -> None:
    """Let it run to its end."""
    with Run(out, *overrides(steps)) as run:
        assert run.end(timeout=600) == 0, run.said


def differences(out: Path, undisturbed: Path, steps: int) -> list[str]:
    """What is not the same, bit for bit: metrics by line, tensors of the last checkpoint by name."""
    found, wanted = (read_metrics(folder / "metrics.jsonl") for folder in (out, undisturbed))
    names = [] if found == wanted else ["metrics.jsonl"]
    found, wanted = (tensors(RunFolder(folder).checkpoint(steps)) for folder in (out, undisturbed))
    return names + [name for name in found.keys() | wanted.keys() if not found[name].equal(wanted[name])]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    steps, rng = 2 * options.kills + 10, random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        out, undisturbed = Path(name) / "killed", Path(name) / "undisturbed"
        finish(undisturbed, steps)
        print("kill  rank  moment      steps reported  steps saved  half-written checkpoint", flush=True)
        for number in range(1, options.kills + 1):
            kill = kill_once(out, steps, rng.choice(MOMENTS), rng)
            if kill is None:
                sys.exit("the run ended before it was killed often enough")
            print(
                f"{number:>4}  {kill.rank:>4}  {kill.moment:<10}  {kill.reported:>14}  {kill.saved:>11}  "
                f"{'yes' if kill.torn else 'no'}",
                flush=True,
            )
        finish(out, steps)
        different = differences(out, undisturbed, steps)
    print(f"{options.kills} kills, {steps} steps: {'the same bits' if not different else f'differ: {different}'}")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
