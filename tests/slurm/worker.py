"""A stand-in for `bft-megatron` that starts in a tenth of a second: no model, but its signals, marks and exit statuses.

Steps are counted by rank 0: `checkpoints/latest_checkpointed_iteration.txt` every five, a line of metrics.jsonl each,
cut back to the checkpoint at a start, as the trainer does. What goes wrong is told by overrides, `fault.RANK=WHAT@STEP`
with WHAT an exit status or `kill`; `fault.times` such starts fail, then it goes well.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from bft_megatron.errors import IN_USE, InUse
from bft_megatron.processes import lease, owner, signals
from bft_megatron.run.folder import RunFolder

SAVE_EVERY = 5


def main() -> None:
    command, *words = sys.argv[1:]
    owner._machine = lambda: os.uname().nodename  # the nodes share a kernel here alone
    options = dict(word.split("=", 1) for word in words if "=" in word)
    folder = RunFolder(Path(options["output"]))
    if command == "preflight":
        time.sleep(float(options.get("preflight_seconds", 0)))
        if os.environ["SLURM_PROCID"] == "0":
            lease.clear(folder.lease)
            print(f"run: {folder.root}")
    elif command == "prepare":
        folder.data.mkdir(parents=True)
        (folder.data / "rows").write_text("prepared")
    else:
        signals.listen()
        with lease.held(folder.lease):
            lease.join(folder.lease)
            train(folder, options)


def train(folder: RunFolder, options: dict[str, str]) -> None:
    rank, steps = int(os.environ["RANK"]), int(options.get("steps", 20))
    start = int(folder.tracker.read_text()) if folder.tracker.exists() else 0
    if rank == 0:
        begin(folder, start)
    wait_for_all(folder, "start")
    time.sleep(float(options.get("import_seconds", 0)))
    fault = fault_of(folder, options, rank)
    step = start
    while step < steps and not signals.received():
        time.sleep(0.1)
        step += 1
        signals.hold()
        if fault and step >= int(fault[1]):
            os.kill(os.getpid(), signal.SIGKILL) if fault[0] == "kill" else sys.exit(int(fault[0]))
        if rank == 0:
            with folder.metrics.open("a") as metrics:
                metrics.write(f"{step}\n")
            if step % SAVE_EVERY == 0:
                folder.write_tracker(step)
    wait_for_all(folder, "end")
    if rank == 0:
        folder.write_tracker(step)
        if step < steps:
            folder.mark_unfinished(f"signal {signal.Signals(signals.received()).name} at step {step}")
        else:
            folder.mark_done()


def wait_for_all(folder: RunFolder, where: str) -> None:
    """No group of all ranks and no save without every rank."""
    attempt = (
        folder.root / f"waiting-{where}" / f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', 0)}"
    )
    attempt.mkdir(parents=True, exist_ok=True)
    (attempt / os.environ["RANK"]).touch()
    while len(list(attempt.iterdir())) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.05)


def begin(folder: RunFolder, start: int) -> None:
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    folder.mark_unfinished("running")
    lines = folder.metrics.read_text().splitlines() if folder.metrics.exists() else []
    folder.metrics.write_text("".join(f"{line}\n" for line in lines[:start]))
    with (folder.root / "starts").open("a") as starts:
        starts.write(f"{os.environ['SLURM_JOB_ID']} {os.environ['WORLD_SIZE']} {start}\n")


def fault_of(folder: RunFolder, options: dict[str, str], rank: int) -> list[str] | None:
    fault = options.get(f"fault.{rank}")
    already = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    return fault.split("@") if fault and already < int(options.get("fault.times", 1)) else None


if __name__ == "__main__":
    try:
        main()
    except InUse as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(IN_USE)
