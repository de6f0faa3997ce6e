"""Leases: one command at a time uses a folder, on a file system that machines share too.

A lease is a file with a name of its own, the only one in a folder. It is taken by renaming a folder that holds it to
that folder's name, which succeeds for one process only, and where that name is free or an empty folder. The owner
renews it by its modification time. Whoever meets a lease watches that time, by a clock of its own, so that the clocks
of machines need not agree; an owner that does not renew it for long is gone, and its file is removed. As no other
lease ever gets that name, neither this nor anything that a stalled owner does can harm the next one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from bft_megatron.errors import IN_USE, InUse, UserError
from bft_megatron.processes import ranks, signals
from bft_megatron.processes.owner import Found, Owner, find, subject

TOKEN = "BFT_MEGATRON_LEASE"
"""Environment variable with the name of this process's lease; the ranks that it starts need none of their own."""
RENEWALS = 12
"""Renewals of a lease in the time after which it would end."""
LOOKS = 120
"""Looks at a lease in that time. They are counted, as a file system that hangs stops owner and observer alike."""
_NONE = "none"
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)


def beside(folder: Path) -> Path:
    """Return the folder of leases of a folder that is yet to appear."""
    return folder.with_name(f".{folder.name}.lease")


def clear(place: Path) -> None:
    """Wait until there is no lease, and remove that of an owner that is gone; a rank accepts that of its own job.

    Raises:
        InUse: its owner lives.
        OSError: the folder of leases cannot be read or written.
    """
    seen: Found | None = None
    looks = 0
    while (found := find(place)) and not (ranks.rank() and found.is_of_this_job()):
        alive = found.is_alive()
        if alive or (seen and seen.file == found.file and seen.renewed != found.renewed):
            raise found.in_use()
        seen, looks = found, looks + 1 if seen == found else 0
        if alive is False or looks == LOOKS:
            found.file.unlink(missing_ok=True)
            _say(f"{subject(place)} is free: " + (f"{found.owner} is gone" if found.owner else "its lease was damaged"))
        elif looks == 3 * LOOKS // RENEWALS:
            _say(f"{found.in_use()}; waiting up to {found.seconds:.0f} s for a sign of life")
        time.sleep(found.seconds / LOOKS if alive is None else 0)


@contextlib.contextmanager
def held(place: Path, rows: str = "", *, share: bool = False) -> Iterator[None]:
    """Hold the lease of a folder, for this process and those that it starts.

    Nothing happens in those, and on a rank other than 0 (see `join`). A folder in which no lease can be written is
    used without, which is said if other files can.

    Args:
        place: the folder of the lease: `lease` in the folder that it is about, or that folder's `beside`.
        rows: identifies the rows that this command prepares.
        share: be content if the command that has the lease prepares the same rows.

    Raises:
        InUse: another command uses the folder.
        UserError: something that is no lease is in its place.
    """
    if _is_ours(place) or ranks.rank() or (share and _has_same_rows(place, rows)):
        yield
        return
    lease, before = _Lease(place, Owner.here(rows)), os.environ.get(TOKEN)
    try:
        lease.take()
    except OSError as e:
        if os.access(place.parent, os.W_OK):  # else the command meets the same, and says so
            _say(f"warning: {subject(place)}: cannot keep other commands out of it: {e.strerror or e}")
        os.environ[TOKEN] = _NONE
    try:
        yield
    finally:
        lease.release(before)


def join(place: Path) -> None:
    """Wait on a rank other than 0 until rank 0 of its job has the lease, or for as long as one lasts.

    Raises:
        InUse: another command has it.
    """
    end = time.monotonic() + Owner.here().seconds
    with contextlib.suppress(OSError):
        while ranks.rank() and not _is_ours(place) and time.monotonic() < end:
            if (found := find(place)) and found.is_of_this_job():
                return
            clear(place)
            time.sleep(0.1)


def check(place: Path) -> None:
    """Raise InUse if another command has taken the lease that this process holds, or the one that started it."""
    if os.environ.get(TOKEN) and not _is_ours(place):
        with contextlib.suppress(OSError, UserError):
            if (found := find(place)) and found.file.name != os.environ[TOKEN]:
                raise _lost(found)


class _Lease:
    """A lease that this process may hold."""

    def __init__(self, place: Path, owner: Owner) -> None:
        job = f"{owner.job}.{owner.restart}." if owner.job else ""  # by which launch/lib.sh knows it
        self.place, self.owner, self.file = place, owner, place / f"{job}{secrets.token_hex(8)}"
        self._ended = threading.Event()
        self._renewer: threading.Thread | None = None
        self._made_root = False

    def take(self) -> None:
        """Take the lease and renew it until its release. Raises InUse, OSError."""
        clear(self.place)
        self._made_root = not self.place.parent.exists()
        self.place.parent.mkdir(parents=True, exist_ok=True)
        while not self._claim():
            clear(self.place)
        os.environ[TOKEN] = self.file.name
        self._said = os.dup(2)  # the terminal, wherever a rank's output goes later
        signals.on_end.append(self._remove)
        # It sleeps or waits for the file system, and holds no lock while this process forks its workers.
        self._renewer = threading.Thread(target=self._renew, daemon=True)
        self._renewer.start()

    def release(self, before: str | None) -> None:
        """Give the lease back, if this process holds it; one of another folder that it had before stays its own."""
        if os.getpid() != self.owner.process:
            return
        os.environ.pop(TOKEN, None)
        if before:
            os.environ[TOKEN] = before
        if self._renewer is None:
            return
        self._ended.set()
        self._renewer.join(self.owner.seconds / RENEWALS)
        os.close(self._said)
        signals.on_end.remove(self._remove)
        self._renewer = None
        self._remove()

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            self.file.unlink()
            self.place.rmdir()
            if self._made_root:
                self.place.parent.rmdir()

    def _claim(self) -> bool:
        """Return whether the lease is this process's, if there was none."""
        made = self.place.with_name(f".{self.place.name}.{self.file.name}")
        try:
            made.mkdir()
            (made / self.file.name).write_text(json.dumps(asdict(self.owner)))
            with contextlib.suppress(OSError):  # some file systems rename to free names alone
                self.place.rmdir()
            made.rename(self.place)
            return True
        except OSError as e:
            if e.errno not in _TAKEN:
                raise
            return False
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def _renew(self) -> None:
        """Renew the lease, or take it again if someone has removed it; end this process if another has it."""
        while not self._ended.wait(self.owner.seconds / RENEWALS):
            with contextlib.suppress(OSError, UserError):  # a full disk or a stale handle harms no healthy run
                try:
                    os.utime(self.file)
                except FileNotFoundError:
                    if not self._ended.is_set() and not self._claim() and (found := find(self.place)):
                        self._end(found)

    def _end(self, found: Found) -> None:
        with contextlib.suppress(OSError):
            os.write(self._said, f"error: {_lost(found)}\n".encode())
        os._exit(IN_USE)  # its children end with it


def _lost(found: Found) -> InUse:
    return InUse(f"lost the lease: {found.in_use()}; nothing more was saved")


def _has_same_rows(place: Path, rows: str) -> bool:
    with contextlib.suppress(OSError):
        found = find(place)
        return (
            found is not None and found.owner is not None and found.owner.rows == rows and found.is_alive() is not False
        )
    return False


def _is_ours(place: Path) -> bool:
    token = os.environ.get(TOKEN)
    return token == _NONE or (bool(token) and os.path.exists(place / str(token)))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
