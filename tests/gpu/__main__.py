"""Runs the tests of this folder in parts, each a pytest of its own, and lists what passed; `make test-gpu`.

    python -m tests.gpu              # all parts, the most telling first
    python -m tests.gpu head runs    # these

A part has eight minutes. Where every test of the head passed, the card is written into the package's file of cards on
which the Triton kernels are the default. Without a GPU each test is skipped with its reason, and nothing is written.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

import torch

from bft_megatron.installation import driver
from bft_megatron.objective import tested_cards

PARTS = ("head", "training", "one_card", "runs", "attention", "several_cards", "delta_rule", "gate")
"""The most telling first."""
LIMIT_SECONDS = 480
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """What became of a part's tests; `ended` is False where it ran out of time or broke off."""

    part: str
    tests: int
    skipped: int
    failed: int
    ended: bool
    seconds: float

    @property
    def good(self) -> bool:
        return self.ended and not self.failed

    @property
    def whole(self) -> bool:
        """Whether every test ran and passed."""
        return self.good and not self.skipped and self.tests > 0

    def __str__(self) -> str:
        verdict = "FAILED" if not self.good else "skipped" if self.skipped == self.tests else "passed"
        passed = self.tests - self.skipped - self.failed
        counts = f"{passed} passed, {self.skipped} skipped, {self.failed} failed" if self.ended else "broke off"
        return f"{verdict:8}{self.part:16}{counts}, {self.seconds:.0f} s"


def file_of(part: str) -> str:
    return f"tests/gpu/test_{part}.py"


def run(part: str, limit: float = LIMIT_SECONDS) -> Outcome:
    """Run a part and end it, with all its processes, past the limit."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = ["-m", "pytest", "-rs", f"--junit-xml={report}", file_of(part)]
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, start_new_session=True)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return read(part, report, time.monotonic() - start)


def read(part: str, report: Path, seconds: float) -> Outcome:
    """Read pytest's report of a part, which is missing where it did not end."""
    if not report.exists():
        return Outcome(part, 0, 0, 0, False, seconds)
    (suite,) = ElementTree.parse(report).getroot()
    tests, skipped, failures, errors = (int(suite.get(n, 0)) for n in ("tests", "skipped", "failures", "errors"))
    return Outcome(part, tests, skipped, failures + errors, True, seconds)


def card_of(outcomes: list[Outcome], release: str) -> tested_cards.Card:
    """Return what the package's file says about this card after these outcomes."""
    import triton

    return tested_cards.Card(
        card=torch.cuda.get_device_name(),
        capability="{}.{}".format(*torch.cuda.get_device_capability()),
        driver=release,
        torch=torch.__version__,
        triton=triton.__version__,
        date=date.today().isoformat(),
        passed=[file_of(outcome.part) for outcome in outcomes if outcome.whole],
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all by default")
    chosen = parser.parse_args().parts or PARTS
    unknown = sorted({*chosen} - {*PARTS})
    if unknown:
        parser.error(f"no parts of tests/gpu: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        return subprocess.call([sys.executable, "-m", "pytest", "-rs", *map(file_of, chosen)], cwd=ROOT)
    outcomes = [run(part) for part in chosen]
    print("", *outcomes, sep="\n")
    if any(outcome.part == "head" and outcome.whole for outcome in outcomes):
        tested_cards.add(card_of(outcomes, driver.release()))
        print(f"the card is in {tested_cards.FILE.relative_to(ROOT)}: commit it")
    return 0 if all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
