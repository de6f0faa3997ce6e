"""Measurements in parts that take up where they stopped: each a process of its own, its numbers kept in one JSON file.

A part counts as measured where the file has it for the same card, driver, torch, Triton and source files. One that
fails, or runs past its time, is listed with the reason and taken again by the next call.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 480


@dataclass(frozen=True)
class Part:
    """A measurement: a module of `benchmarks.gpu`, or a script, that writes its numbers to the file after `--json`."""

    name: str
    words: list[str]

    def command(self, file: Path) -> list[str]:
        """Return the command that measures it."""
        return [sys.executable, *self.words, "--json", str(file)]


def machine() -> dict[str, str]:
    """Return what must be the same for a measurement to be the same."""
    words = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
    card, _, driver = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip().partition(", ")
    return {
        "card": card,
        "driver": driver,
        **{name: _version(name) for name in ("torch", "triton")},
        "source": source(),
    }


def source() -> str:
    """Return a digest of the source files that are measured and that measure."""
    files = sorted(file for room in ("bft_megatron", "benchmarks") for file in (ROOT / room).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


class Results:
    """The numbers of parts, in a file that is whole after each of them."""

    def __init__(self, file: Path, machine: dict[str, str]) -> None:
        self.file, self.machine = file, machine
        self.all: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []

    def of(self, part: Part) -> Any:
        """Return the numbers of a part on this machine, None where it is not measured."""
        same = (each for each in self.all if (each["part"], each["words"]) == (part.name, part.words))
        return next((each["found"] for each in same if each["machine"] == self.machine), None)

    def add(self, part: Part, found: Any, seconds: float) -> None:
        """Write a part's numbers."""
        line = {"part": part.name, "words": part.words, "machine": self.machine, "date": date.today().isoformat()}
        self.all.append(line | {"seconds": round(seconds), "found": found})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        whole = self.file.with_suffix(".new")
        whole.write_text(json.dumps(self.all, indent=1))
        whole.replace(self.file)


def measure(parts: list[Part], results: Results, limit: float = LIMIT_SECONDS) -> dict[str, str]:
    """Measure the parts that are not yet -> why each of the others failed."""
    failed = {}
    for part in parts:
        if results.of(part) is not None:
            print(f"{part.name}: measured before", flush=True)
            continue
        start = time.monotonic()
        found, reason = _run(part, limit)
        seconds = time.monotonic() - start
        print(f"{part.name}: {reason or 'measured'}, {seconds:.0f} s", flush=True)
        if reason:
            failed[part.name] = reason
        else:
            results.add(part, found, seconds)
    return failed


def _run(part: Part, limit: float) -> tuple[Any, str]:
    """Run a part's process and end it, with all that it started, past the limit -> (numbers, why there are none)."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        process = subprocess.Popen(part.command(file), cwd=ROOT, stdout=sys.stderr, start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None, f"ran past {limit:.0f} s"
        if status:
            return None, f"ended with status {status}"
        return json.loads(file.read_text()), ""
