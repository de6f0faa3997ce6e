"""Commands as their ranks run them, with forked processes in place of started ones: no import of torch for each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bft_megatron import cli
from bft_megatron.processes import launcher
from tests.world import run_world

ROOT = Path(__file__).parents[1]


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Call the command line in this process and at the project's root, its ranks in a forked world -> exit status."""
    words = [str(a) for a in arguments]

    def launch(given: list[str], processes: int) -> int:
        return max(run_world(processes, _call, given, megatron=True))

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(launcher, "launch", launch)
    return _call(words)


def _call(words: list[str]) -> int:
    before, sys.argv = sys.argv, ["bft-megatron", *words]
    try:
        cli.main()
    except SystemExit as e:
        return int(e.code or 0)
    finally:
        sys.argv = before
    return 0
