"""Commands, run with forked ranks (none of which imports torch again) or in a process of their own as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bft_megatron import cli
from bft_megatron.processes import launcher
from tests.helpers.world import run_world

ROOT = Path(__file__).parents[2]


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Call the command line in this process and at the project's root, its ranks in a forked world -> exit status."""
    words = [str(a) for a in arguments]

    def launch(given: list[str], processes: int) -> int:
        return max(run_world(processes, _call, given, megatron=True))

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(launcher, "launch", launch)
    return _call(words)


def command(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The installed command in a process of its own, without a launcher's environment."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    words = [sys.executable, "-m", "bft_megatron", *map(str, arguments)]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


def _call(words: list[str]) -> int:
    before, sys.argv = sys.argv, ["bft-megatron", *words]
    try:
        cli.main()
    except SystemExit as e:
        return int(e.code or 0)
    finally:
        sys.argv = before
    return 0
