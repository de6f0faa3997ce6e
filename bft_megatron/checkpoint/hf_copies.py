"""`train.save_hf`: every kept checkpoint as a Hugging Face model too, in the run's folder. Called on rank 0.

By the export command in a process of its own, one at a time: the ranks go on meanwhile, and what a kill cuts short is
gone on with.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TextIO

from bft_megatron.processes import ranks
from bft_megatron.run.folder import RunFolder


class HFCopies:
    """The copies of a run.

    Args:
        folder: of the run.
        console: where a copy that failed is told of.
    """

    def __init__(self, folder: RunFolder, console: TextIO) -> None:
        self.folder, self.console = folder, console
        self._iteration = 0
        self._export: subprocess.Popen[bytes] | None = None

    def follow(self) -> None:
        """After a save: remove copies of checkpoints that are gone, and begin one of the newest that has none."""
        self._reap()
        if self._export is None:
            self._remove_others()
            if missing := self._missing():
                self._begin(missing[0])

    def complete(self) -> None:
        """At the end of the run: wait until every checkpoint has its copy, or has failed to get one."""
        tried: set[int] = set()
        while self._export is not None or (missing := [i for i in self._missing() if i not in tried]):
            export = self._export or self._begin(missing[0])
            tried.add(self._iteration)
            export.wait()
            self._reap()
        self._remove_others()

    def stop(self) -> None:
        """End the export that is running, before the time limit does."""
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
            export = subprocess.Popen(command, env=environment, stdout=log, stderr=log, process_group=0)
        self._iteration, self._export = iteration, export
        return export

    def _reap(self) -> None:
        """Forget an export that has ended; say so where it failed and its checkpoint is still there."""
        if self._export is None or self._export.poll() is None:
            return
        if self._export.returncode and self._iteration in self._kept():
            said = self._log.read_text().strip().rpartition("\n")[2]
            print(f"no Hugging Face copy of step {self._iteration}: {said}", file=self.console, flush=True)
        self._export = None

    def _remove_others(self) -> None:
        names = {self.folder.hf_copy(i).name for i in self._kept()}
        for copy in self.folder.hf_copies.glob("*iter_*"):  # also what an export left unfinished, `.iter_*.partial`
            if copy.name.strip(".").removesuffix(".partial") not in names:
                shutil.rmtree(copy, ignore_errors=True)

    @property
    def _log(self) -> Path:
        return self.folder.root / "logs" / "save-hf.log"
