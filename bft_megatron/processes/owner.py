"""The owner of a lease: the process that `lease` names to others, and whether it lives."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import socket
import stat
import sys
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from bft_megatron.errors import InUse, UserError, shortened

_NAME = re.compile(r"([0-9]+\.[0-9]+\.)?[0-9a-f]{16}")
_FOREIGN = "is no lease, and in its place: move it away"

LASTING = "BFT_MEGATRON_LEASE_SECONDS"
"""Environment variable with the seconds without renewal after which a lease ends; default 120."""


@dataclass(frozen=True)
class Owner:
    """The owner of a lease, as it is written in it.

    Attributes:
        host, process: for a person to find it.
        born: the process's start, in the kernel's ticks.
        machine: the boot of the kernel and the process namespace, within which a process id means something.
        job, restart: Slurm's, or "" and 0.
        meeting: where the ranks of its job meet, the same on all of them.
        command, started: what it runs, since when.
        rows: identifies the rows that it prepares, or "".
        seconds: without renewal, after which the lease ends.
    """

    host: str
    process: int
    born: int
    machine: str
    job: str
    restart: int
    meeting: str
    command: str
    started: str
    rows: str
    seconds: float

    @classmethod
    def here(cls, rows: str = "") -> Owner:
        """Return this process as an owner."""
        own, job, restart = os.getpid(), os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "")
        return cls(
            host=socket.gethostname(),
            process=own,
            born=_born(own) or 0,
            machine=_machine(),
            job=job,
            restart=int(restart) if restart.isdigit() else 0,
            meeting=" ".join([os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", ""), job, restart]),
            command=shlex.join(["bft-megatron", *sys.argv[1:]]),
            started=datetime.now().astimezone().isoformat(" ", "seconds"),
            rows=rows,
            seconds=_lasting(),
        )

    def __str__(self) -> str:
        job = f" of Slurm's job {self.job}" if self.job else ""
        said = f"process {self.process} on {self.host}{job}, since {self.started} ({self.command})"
        return shortened(" ".join(said.split()), 500)

    def is_alive(self) -> bool | None:
        """Return whether the process exists, or None if that cannot be seen from here."""
        if not self.machine or self.machine != _machine():
            return None
        born = _born(self.process)
        if born is None:
            try:
                os.kill(self.process, 0)
            except ProcessLookupError:
                return False
            except PermissionError:  # another user's, hidden by the mount's options
                return None
        return born == self.born


@dataclass(frozen=True)
class Found:
    """A lease as it was found: its file, when that was renewed, and its owner, or None if it is damaged."""

    file: Path
    renewed: int
    owner: Owner | None

    @property
    def seconds(self) -> float:
        """Without renewal, after which it ends."""
        return (self.owner or Owner.here()).seconds

    def in_use(self) -> InUse:
        """Return the error of whoever wants the folder."""
        who = self.owner or f"an unknown process, with a damaged lease ({self.file})"
        return InUse(f"{subject(self.file.parent)} is in use by {who}: let it end, or choose another folder")

    def is_alive(self) -> bool | None:
        """Return whether its owner lives, or None if only watching can tell."""
        here = Owner.here()
        if self.owner is None:
            return None
        # Slurm runs a job once at a time, so that its earlier start has ended.
        earlier = self.owner.job == here.job != "" and self.owner.restart < here.restart
        return False if earlier else self.owner.is_alive()

    def is_of_this_job(self) -> bool:
        """Return whether rank 0 of this rank's job owns it."""
        return self.owner is not None and self.owner.meeting == Owner.here().meeting


def subject(place: Path) -> Path:
    """Return the folder that the lease in a folder of leases is about."""
    name = place.name.removeprefix(".").removesuffix(".lease")
    return place.parent if place.name == name else place.with_name(name)


def find(place: Path) -> Found | None:
    """Return the lease in a folder of leases, or None.

    Raises:
        UserError: something else is in the way: it is never taken for a damaged lease, which would be removed.
        OSError: the folder cannot be read.
    """
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise UserError(_FOREIGN, str(place))
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(place)):
            if not _NAME.fullmatch(name) or not stat.S_ISREG(os.lstat(place / name).st_mode):
                raise UserError(_FOREIGN, str(place / name))
            with contextlib.suppress(FileNotFoundError), open(place / name, "rb") as file:  # opening asks a file server
                return Found(place / name, os.fstat(file.fileno()).st_mtime_ns, _owner(file.read(1 << 20)))
    return None


def _owner(content: bytes) -> Owner | None:
    try:
        owner, here = Owner(**json.loads(content)), asdict(Owner.here())
    except (RecursionError, TypeError, ValueError):
        return None
    well = {k: type(v) for k, v in asdict(owner).items()} == {k: type(v) for k, v in here.items()}
    return owner if well and 0 < owner.seconds < 86_400 and 0 < owner.process < 1 << 31 else None


def _lasting() -> float:
    text = os.environ.get(LASTING, "120")
    try:
        if 0 < float(text) < 86_400:
            return float(text)
    except ValueError:
        pass
    raise UserError(f"must be seconds, above 0 and below a day, not {text!r}", f"environment variable {LASTING}")


def _machine() -> str:
    """Return what processes of this machine that see each other's ids have alike, or "" if it cannot be told."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(process: int) -> int | None:
    """Return the start of a process, in ticks since the boot; None if there is none, or it is dead and not yet gone."""
    try:
        words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] in "ZX" else int(words[19])
