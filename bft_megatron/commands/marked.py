"""Starting the ranks of a command that leaves a mark in the run's folder: status 0 comes only with the mark."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from bft_megatron.processes import launcher
from bft_megatron.run.folder import RunFolder


def launch(processes: int, folder: RunFolder, is_marked: Callable[[], bool]) -> NoReturn:
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
