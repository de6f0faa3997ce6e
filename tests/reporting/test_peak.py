"""The peak that a run reports, of the fullest rank and beside the planned."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
import torch.distributed as dist

from bft_megatron.reporting.peak import report_peak
from bft_megatron.run.folder import RunFolder
from tests.helpers.world import run_world


def test_the_fullest_rank_is_reported_beside_the_plan(tmp_path: Path):
    (tmp_path / "plan.json").write_text(json.dumps({"peak_gib": 61.54}))
    said = run_world(2, reported, tmp_path, megatron=True)
    assert said == ["peak memory, on the fullest GPU: 2.0 GiB; 61.5 planned\n", ""]


def reported(folder: Path) -> str:
    torch.cuda.max_memory_allocated = lambda: (1 + dist.get_rank()) << 30
    console = io.StringIO()
    report_peak(RunFolder(folder), console)
    return console.getvalue()
