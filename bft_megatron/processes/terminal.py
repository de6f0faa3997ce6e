"""Redirecting a rank's output to its log file, so that only our own lines reach the terminal.

The file descriptors are redirected, because libraries print from C++ and from threads too, and before torch and
Megatron are imported, because they print during import.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from bft_megatron.errors import BLOWN_UP, BlownUp, UserError
from bft_megatron.processes import ranks


@contextlib.contextmanager
def output_to(log: Path) -> Iterator[TextIO]:
    """Redirect what this process prints to a file; yield the terminal, or a batch job's output in its place.

    On a failure, the traceback goes to the file and the terminal gets one line with the error, its notes, and the
    command that resumes the run; the process exits with 1, or with `BLOWN_UP` if the run blew up. A UserError is
    left to the command line.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    before = [os.dup(1), os.dup(2)]
    console = os.fdopen(os.dup(1), "w")
    with log.open("a") as file:
        _redirect([file.fileno(), file.fileno()])
    try:
        yield console
    except UserError:
        raise
    except Exception as e:
        traceback.print_exc()
        if not isinstance(e, BlownUp) or ranks.rank() == 0:  # all ranks raise the same BlownUp
            print(_last_line(e, log), file=console, flush=True)
        sys.exit(BLOWN_UP if isinstance(e, BlownUp) else 1)
    finally:
        _redirect(before)


def _last_line(e: Exception, log: Path) -> str:
    what = str(e).strip().partition("\n")[0]
    said = "; ".join([f"rank {ranks.rank()}: {type(e).__name__}: {what}", *getattr(e, "__notes__", ())])
    command = shlex.join(["bft-megatron", *sys.argv[1:]])
    return f"{said}; command: {command} (traceback in {log})"


def _redirect(targets: list[int]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    for descriptor, target in zip((1, 2), targets, strict=True):
        os.dup2(target, descriptor)
