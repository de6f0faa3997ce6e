"""`train.save_hf`: exports every kept checkpoint to a Hugging Face model in the run's folder. Called on rank 0.

The export command runs in its own process, one at a time, while training continues; an export that was killed is
resumed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TextIO

from bft_megatron import parent
from bft_megatron.processes import ranks
from bft_megatron.run.folder import RunFolder


class HFCopies:
    """The Hugging Face copies of a run's checkpoints.

    Args:
        folder: the run's folder.
        console: gets a line for each copy that failed.
    """

    def __init__(self, folder: RunFolder, console: TextIO) -> None:
        self.folder, self.console = folder, console
        self._iteration = 0
        self._export: subprocess.Popen[bytes] | None = None

    def follow(self) -> None:
        """Remove copies of deleted checkpoints and start exporting the newest without a copy. Call it after a save."""
        self._reap()
        if self._export is None:
            self._remove_others()
            if missing := self._missing():
                self._begin(missing[0])

    def complete(self) -> None:
        """Wait until every checkpoint has a copy or its export has failed. Call it at the end of the run."""
        tried: set[int] = set()
        while self._export is not None or (missing := [i for i in self._missing() if i not in tried]):
            export = self._export or self._begin(missing[0])
            tried.add(self._iteration)
            export.wait()
            self._reap()
        self._remove_others()

    def stop(self) -> None:
        """Kill the running export, so that it does not run into the time limit."""
        if self._export is not None:
            self._export.kill()
            self._export.wait()

    def _kept(self) -> list[int]:
        finished = (i for i in self.folder.iterations() if (self.folder.checkpoint(i) / "metadata.json").exists())
        return sorted(finished, reverse=True)

    def _missing(self) -> list[int]:
        return [i for i in self._kept() if not self.folder.hf_copy(i).exists()]

    def _begin(self, iteration: int) -> subprocess.Popen[bytes]:
        environment = ranks.as_no_rank() | {"CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "bft_megatron", "export", str(self.folder.root)]
        command += [str(self.folder.hf_copy(iteration)), "--iteration", str(iteration)]
        with self._log.open("w") as log:
            export = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, process_group=0, preexec_fn=parent.end_with_it
            )
        self._iteration, self._export = iteration, export
        return export

    def _reap(self) -> None:
        """Forget an export that has ended; report a failure if its checkpoint still exists."""
        if self._export is None or self._export.poll() is None:
            return
        if self._export.returncode and self._iteration in self._kept():
            said = self._log.read_text().strip().rpartition("\n")[2]
            print(f"no Hugging Face copy of step {self._iteration}: {said}", file=self.console, flush=True)
        self._export = None

    def _remove_others(self) -> None:
        names = {self.folder.hf_copy(i).name for i in self._kept()}
        for copy in self.folder.hf_copies.glob("*iter_*"):  # including unfinished exports, `.iter_*.partial`
            if copy.name.strip(".").removesuffix(".partial") not in names:
                shutil.rmtree(copy, ignore_errors=True)

    @property
    def _log(self) -> Path:
        return self.folder.root / "logs" / "save-hf.log"
