"""The cluster page's first torchrun command trains, on two processes of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import read
from tests.helpers.commands import ROOT


@pytest.mark.slow
def test_torchrun_trains(tmp_path: Path):
    words = next(words for words in read("docs/cluster.md").commands() if words[0] == "torchrun")
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    more = ["train.iterations=1", "train.warmup_iterations=0", f"output={tmp_path}"]
    done = subprocess.run(
        [str(Path(sys.executable).with_name(words[0])), *words[1:], *more],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "done").exists()
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [line["iteration"] for line in lines if "split" not in line] == [1]
