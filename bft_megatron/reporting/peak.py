"""The report of peak GPU memory after a run, beside the planned peak."""

from __future__ import annotations

import json
from typing import TextIO

import torch
import torch.distributed as dist

from bft_megatron.processes.device import current_device
from bft_megatron.run.folder import RunFolder


def report_peak(folder: RunFolder, console: TextIO) -> None:
    """Print PyTorch's peak on the fullest rank, and the peak in the run's `plan.json` if there is one.

    Collective over all ranks: one MAX all-reduce of one number.
    """
    peak = torch.tensor(torch.cuda.max_memory_allocated() / 2**30, device=current_device())
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        planned = f"; {json.loads(folder.plan.read_text())['peak_gib']:.1f} planned" if folder.plan.exists() else ""
        print(f"peak memory, on the fullest GPU: {peak.item():.1f} GiB{planned}", file=console, flush=True)
