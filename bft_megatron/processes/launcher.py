"""The local launcher: starts one process per rank on this machine, forwards signals, ends all ranks when one fails.

On a cluster the scheduler starts the ranks and this module is not used. It doesn't depend on Megatron, and imports
torch only to count GPUs.
"""

from __future__ import annotations

import contextlib
import glob
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bft_megatron import parent
from bft_megatron.errors import USER_ERROR
from bft_megatron.processes import ranks, signals
from bft_megatron.recipe.schema import Recipe

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""The first and the last port that the kernel gives to a process that asks for any."""
GRACE_SECONDS = 3
"""Time for the other ranks to fail by themselves, with a message, before they are killed after one has failed."""


def local_processes(recipe: Recipe) -> int:
    """Return the number of ranks on this machine: one per GPU, or on CPU as many as the recipe's layout needs."""
    on_cpu = recipe.parallel.model_parallel_size * recipe.parallel.data
    return on_cpu if recipe.device == "cpu" else _count_gpus() or on_cpu


def _count_gpus() -> int:
    """Return the number of GPUs; torch, which takes seconds to import, is asked only if the driver's devices exist."""
    if not glob.glob("/dev/nvidia[0-9]*"):
        return 0
    import torch

    return torch.cuda.device_count()


def launch(arguments: list[str], processes: int) -> int:
    """Run `python -m bft_megatron *arguments` as ranks 0..processes-1 and wait.

    Returns:
        0, or the status of the first rank that failed (128 + signal number if it was killed), after ending the others.
        Signals stay blocked in a rank until it can handle them (`processes.signals.listen`).
    """
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "OMP_NUM_THREADS": threads}
    command = [sys.executable, "-m", "bft_megatron", *arguments]
    children = [
        subprocess.Popen(
            command,
            env=ranks.as_rank(r, processes) | meeting,
            preexec_fn=_prepare_child,
            process_group=0,  # Ctrl-C reaches the ranks only through the launcher
        )
        for r in range(processes)
    ]
    with _signals_passed_on(children):
        return _wait(children)


def _free_port() -> int:
    """Return a free port, which no process is given by chance before rank 0, seconds later, takes it.

    It is none of those from which the kernel gives a port to whoever asks for any, unless all others are taken.
    """
    first, last = 32_768, 60_999  # Linux's default
    with contextlib.suppress(OSError):
        first, last = map(int, EPHEMERAL.read_text().split())
    others = [port for port in range(10_000, 1 << 16) if not first <= port <= last]
    for port in [*random.sample(others, len(others)), 0]:
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("", port))
            return int(s.getsockname()[1])
    raise OSError("no port is free")


def _prepare_child() -> None:
    """Block signals in a child before exec, and have it end with the launcher."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.ASKING)
    parent.end_with_it()


@contextlib.contextmanager
def _signals_passed_on(children: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Forward the signals that ask to stop to the ranks; a second Ctrl-C kills them."""
    interrupted = False

    def forward(number: int, _: object) -> None:
        nonlocal interrupted
        twice, interrupted = interrupted and number == signal.SIGINT, interrupted or number == signal.SIGINT
        for rank in children:
            if rank.poll() is None:
                rank.send_signal(signal.SIGKILL if twice else number)

    before = {s: signal.signal(s, forward) for s in signals.asking()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: list[subprocess.Popen[bytes]]) -> int:
    while True:
        states = [rank.poll() for rank in children]
        failed = [(rank, s) for rank, s in enumerate(states) if s]
        if failed:
            _end(children)
            # An error of the user's input is the cause, if a peer has failed in the same moment for want of this rank.
            rank, status = next((f for f in failed if f[1] == USER_ERROR), failed[0])
            if status < 0:
                print(f"rank {rank} {_killed(signal.Signals(-status))}", flush=True)
            elif rank != 0 and children[0].returncode != status == USER_ERROR:  # rank 0 says what all ranks meet
                print(f"rank {rank} ended first, with status {status}: its log says why", flush=True)
            return status if status > 0 else 128 - status
        if all(s == 0 for s in states):
            return 0
        time.sleep(0.05)


def _killed(number: signal.Signals) -> str:
    if number in signals.ASKING:  # a rank that has something to save remembers these
        return f"was stopped by {number.name}, before there was anything to save"
    return f"was killed by {number.name}"


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + GRACE_SECONDS
    for rank in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(max(0.0, deadline - time.monotonic()))
    for rank in children:
        if rank.poll() is None:
            rank.kill()
            rank.wait()
