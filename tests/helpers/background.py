"""The tiny run as a command on two ranks, started and left running, so that a test can do something to it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers.commands import ROOT

STEPS = 6
WORLD = 2


def arguments(out: Path, *overrides: str) -> list[str]:
    """Words of the command: six steps at TP 2, validated in the middle, saved at the end alone."""
    words = ["train", "recipes/tiny.yaml", f"output={out}", f"train.iterations={STEPS}", "train.validate_every=3"]
    return [*words, f"parallel.tensor={WORLD}", "parallel.data=1", *overrides]


class Run:
    """A run in the background, its output in `said` as it comes."""

    def __init__(self, out: Path, *overrides: str, prefix: tuple[str, ...] = ()) -> None:
        self.out = out
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        words = [*prefix, sys.executable, "-m", "bft_megatron", *arguments(out, *overrides)]
        self.process = subprocess.Popen(
            words, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.said = ""

    def until(self, text: str) -> Run:
        """Read on to a line that begins with this."""
        for line in self.process.stdout:
            self.said += line
            if line.startswith(text):
                return self
        raise AssertionError(f"no line {text!r}:\n{self.said}")

    def ranks(self, timeout: float = 60) -> list[int]:
        """Process ids of the ranks, in their order, as soon as all have started."""
        deadline = time.monotonic() + timeout
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        while time.monotonic() < deadline:
            found = sorted(int(pid) for pid in children.read_text().split())
            if len(found) == WORLD and all(_is_a_rank(pid) for pid in found):
                return found
            time.sleep(0.001)
        raise AssertionError(f"{WORLD} ranks did not start")

    def end(self, timeout: float = 240) -> int:
        """Wait for it -> its status."""
        self.said += self.process.communicate(timeout=timeout)[0]
        return self.process.returncode

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:  # the ranks end with it
            self.process.kill()
        self.process.communicate()


def _is_a_rank(pid: int) -> bool:
    try:
        return b"RANK=" in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
