"""A run disturbed again and again, held to the same run left alone: kills, flipped bits, changed data, a full disk.

    python -m tests.checkpoint.soak --events 30 [--experts | --hybrid]

prints a line an event and ends with status 0 where the last weights, Adam's moments and all metrics are the same bits.
It runs in a mount namespace of its own, with the disturbed run on a small disk in memory. The run is the tiny one at
TP 2, a mixture of experts at EP 2, or a hybrid in bf16 at TP 2.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bft_megatron.run.folder import RunFolder
from tests.helpers.background import WORLD, Run
from tests.helpers.checkpoints import tensors
from tests.helpers.material import TINY
from tests.helpers.runs import read_metrics, write_data

MOMENTS = ("starting", "in a step", "in a step", "in a save", "in a save")
DISK_BYTES = 256 << 20
"""Size of the disturbed run's disk; a checkpoint takes 4 MB."""


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

    def __str__(self) -> str:
        torn = ", a half-written checkpoint left" if self.torn else ""
        return f"rank {self.rank} killed {self.moment}: {self.reported} steps reported, {self.saved} saved{torn}"


def overrides(steps: int) -> tuple[str, ...]:
    """A checkpoint a step, so that about half of the time is spent saving."""
    return (f"train.iterations={steps}", "train.save_every=1")


def mixture(folder: Path) -> tuple[str, ...]:
    """The overrides for a mixture of experts at EP 2, whose model is written below a folder."""
    folder.mkdir()
    write_data(folder)
    return (f"model={folder / 'qwen3_moe'}", "parallel.tensor=1", f"parallel.data={WORLD}", f"parallel.expert={WORLD}")


def hybrid(folder: Path) -> tuple[str, ...]:
    """The overrides for a hybrid in bf16, some of whose parameters are fp32."""
    folder.mkdir()
    write_data(folder)
    return (f"model={folder / 'hybrid'}", "train.precision=bf16")


def kill_once(out: Path, words: tuple[str, ...], moment: str, rng: random.Random) -> Kill | None:
    """Start or go on with the run and kill a rank; None where the run ended before that."""
    folder, rank = RunFolder(out), rng.randrange(WORLD)
    with Run(out, *words) as run:
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


def finish(out: Path, words: tuple[str, ...]) -> None:
    """Let it run to its end."""
    with Run(out, *words) as run:
        assert run.end(timeout=600) == 0, run.said


def differences(out: Path, undisturbed: Path, steps: int) -> list[str]:
    """What is not the same, bit for bit: metrics by line, tensors of the last checkpoint by name."""
    found, wanted = (read_metrics(folder / "metrics.jsonl") for folder in (out, undisturbed))
    names = [] if found == wanted else ["metrics.jsonl"]
    found, wanted = (tensors(RunFolder(folder).checkpoint(steps)) for folder in (out, undisturbed))
    return names + [name for name in found.keys() | wanted.keys() if not found[name].equal(wanted[name])]


class Soak:
    """The disturbed run, and what can happen to it. Each event is over when its method returns what it did.

    Args:
        out: the run's folder.
        data: the file that it learns from, its own.
        words: the overrides of its command.
    """

    def __init__(self, out: Path, data: Path, words: tuple[str, ...], rng: random.Random) -> None:
        self.out, self.data, self.words, self.rng = out, data, words, rng

    @property
    def events(self) -> list[Callable[[], str]]:
        """Everything that can happen; a kill more often than the rest."""
        harms = [self.flip_checkpoint, self.flip_rows, self.touch_data, self.change_data, self.fill_disk]
        return [self.kill, self.kill, self.kill, *harms]

    def kill(self) -> str:
        """Kill a rank at a random moment."""
        kill = kill_once(self.out, self.words, self.rng.choice(MOMENTS), self.rng)
        if kill is None:
            sys.exit("the run ended before it was disturbed often enough")
        return str(kill)

    def flip_checkpoint(self) -> str:
        """Flip a bit in a file of the newest checkpoint, where an older one is left to go back to."""
        folder = RunFolder(self.out)
        if len(folder.iterations()) < 2:
            return self.kill()
        newest = folder.checkpoint(folder.saved_iteration())
        file = self._flip(self.rng.choice(sorted(path for path in newest.iterdir() if path.stat().st_size)))
        return f"a bit flipped in {newest.name}/{file.name}; {self.kill()}"

    def flip_rows(self) -> str:
        """Flip a bit in the prepared rows."""
        file = self._flip(self.rng.choice(sorted((self.out / "data").glob("*/*"))))
        return f"a bit flipped in data/{file.parent.name[:8]}/{file.name}; {self.kill()}"

    def touch_data(self) -> str:
        """Write the data's file anew with the same content."""
        self.data.write_bytes(self.data.read_bytes())
        return f"the data written anew, unchanged; {self.kill()}"

    def change_data(self) -> str:
        """Change the data: the run must refuse to go on; then put it back. Before the first save it may begin anew."""
        if not RunFolder(self.out).saved_iteration():
            return self.kill()
        before = self.data.read_bytes()
        self.data.write_bytes(before.partition(b"\n")[2])
        with Run(self.out, *self.words) as run:
            assert run.end() == 2, run.said
        assert "data.train" in run.said, run.said
        self.data.write_bytes(before)
        return f"a row less in the data: refused; put back; {self.kill()}"

    def fill_disk(self) -> str:
        """Take all room on the disk while the run goes on: it must fail on a save; then free it."""
        ballast = self.out.parent / "ballast"
        with Run(self.out, *self.words) as run, ballast.open("wb", buffering=0) as file:
            run.until("step ")
            while run.process.poll() is None:  # a deleted checkpoint makes room again
                with contextlib.suppress(OSError):
                    file.write(bytes(shutil.disk_usage(self.out).free))
                time.sleep(0.01)
            # A second rank whose write fails may crash in torch's writer while it is closed.
            assert run.end() in (1, 128 + signal.SIGSEGV), run.said
        ballast.unlink()
        assert "No space left on device" in run.said, run.said
        return "the disk full in a step; freed"

    def _flip(self, file: Path) -> Path:
        content = bytearray(file.read_bytes())
        content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        file.write_bytes(content)
        return file


def main() -> None:
    """Disturb a run and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--experts", dest="model", action="store_const", const=mixture, help="a mixture at EP 2")
    models.add_argument("--hybrid", dest="model", action="store_const", const=hybrid, help="a hybrid in bf16 at TP 2")
    parser.add_argument("--disk", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.disk is None:
        sys.exit(_on_a_disk_of_its_own())
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", options.disk], check=True)
    steps, rng = 3 * options.events + 10, random.Random(options.seed)
    out, data, undisturbed = (options.disk / name for name in ("disturbed", "train.jsonl", "undisturbed"))
    shutil.copyfile(TINY / "train.jsonl", data)
    words = (
        *overrides(steps),
        f"data.train={data}",
        *(options.model(options.disk / "models") if options.model else ()),
    )
    finish(undisturbed, words)
    soak = Soak(out, data, words, rng)
    print(f"event 1: {soak.kill()}", flush=True)  # the others need a run that has begun
    for number in range(2, options.events + 1):
        print(f"event {number}: {rng.choice(soak.events)()}", flush=True)
    finish(out, words)
    different = differences(out, undisturbed, steps)
    print(f"{options.events} events, {steps} steps: {'the same bits' if not different else f'differ: {different}'}")
    sys.exit(bool(different))


def _on_a_disk_of_its_own() -> int:
    """Run this program again where it may mount a disk, without being root and unseen by other processes."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    with tempfile.TemporaryDirectory() as disk:
        again = [sys.executable, "-m", "tests.checkpoint.soak", *sys.argv[1:], "--disk", disk]
        return subprocess.run([*unshare, *again], check=False).returncode


if __name__ == "__main__":
    main()
