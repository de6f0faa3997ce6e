"""The commands that leave a mark in the run's folder, `train` and `convert`: status 0 comes only with the mark.

They hold the folder's lease: the process that starts the ranks, or else rank 0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from bft_megatron.checkpoint.hf_copies import HFCopies
from bft_megatron.commands.request import Request
from bft_megatron.processes import launcher, lease, ranks
from bft_megatron.processes.terminal import output_to
from bft_megatron.run.folder import RUNNING, RunFolder


def train(request: Request) -> None:
    """Start the ranks of a run, or on a rank train; only say so if the run is done. Raises InUse, UserError."""
    in_rank, processes = request.world()
    with request.folder_held():
        _train(request, in_rank, processes)


def _train(request: Request, in_rank: bool, processes: int) -> None:
    recipe, folder = request.recipe, request.folder
    rows = request.rows_of_rank() if in_rank else request.prepare()
    if folder.is_done(rows.steps):
        if ranks.rank() == 0:
            print(f"finished: {folder.root} holds the checkpoint of the last step, {rows.steps}")
            if recipe.train.save_hf:
                HFCopies(folder, sys.stdout).complete()
        return
    request.check_adapters()
    if not in_rank:
        _launch(processes, folder, lambda: folder.is_done(rows.steps) or folder.stopped() is not None)
    lease.join(folder.lease)
    if ranks.rank() == 0:
        request.describe_run(rows)
        folder.mark_unfinished(RUNNING)
    with output_to(folder.log(ranks.rank())) as console:
        from bft_megatron.run.resolved import Run
        from bft_megatron.training import loop

        run = Run(recipe, request.config, request.model_folder, rows, processes)
        request.check(lambda: loop.train(run, console))


def convert(request: Request) -> None:
    """Start the ranks that write the model as a Megatron checkpoint, or on a rank write it. Raises InUse, UserError."""
    in_rank, processes = request.world()
    recipe, folder = request.recipe, request.folder
    with request.folder_held():
        request.check(lambda: folder.check_converts(recipe))
        if not in_rank:
            _launch(processes, folder, (folder.converted / "metadata.json").exists)
        lease.join(folder.lease)
        if ranks.rank() == 0:
            folder.write_config(recipe, request.model_folder)
        with output_to(folder.log(ranks.rank())) as console:
            from bft_megatron.commands import convert as converting

            converting.run(recipe, request.config, request.model_folder, console)


def _launch(processes: int, folder: RunFolder, is_marked: Callable[[], bool]) -> NoReturn:
    """Run this command as ranks on this machine and exit with their status, or 1 if they leave no mark with status 0.

    Code of others may end a rank with status 0 at any time.

    Args:
        is_marked: whether the folder says that the ranks did their work.
    """
    status = launcher.launch(sys.argv[1:], processes)
    if status == 0 and not is_marked():
        print(f"the ranks ended with status 0 and without their work done; {folder.root}/logs says why", flush=True)
        status = 1
    sys.exit(status)
