"""Who sees what: our own lines go to the terminal, what Megatron and other libraries print to a log file a rank.

By file descriptor, since libraries print from C++ and from threads too; and before torch and Megatron are imported,
which print when they are.
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

from bft_megatron.errors import BAD_STEPS, BadSteps, UserError
from bft_megatron.processes import ranks


@contextlib.contextmanager
def output_to(log: Path) -> Iterator[TextIO]:
    """Send what this process prints to a file; yields the terminal, or what stands for it in a batch job.

    A failure's traceback goes to the file; the terminal gets one line with what failed, its notes, and the command that
    goes on, and the process exits with 1, or 65 after too many bad steps. A user's error is left to the command line.
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
        if not isinstance(e, BadSteps) or ranks.rank() == 0:  # which all ranks raise alike
            print(_last_line(e, log), file=console, flush=True)
        sys.exit(BAD_STEPS if isinstance(e, BadSteps) else 1)
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
