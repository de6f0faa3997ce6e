"""Function calls in forked processes, a few at a time: Megatron sets its globals once, and its import takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from itertools import batched
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bft_megatron.errors import FieldError, UserError

AT_ONCE = min(4, len(os.sched_getaffinity(0)))
"""Processes at a time; each takes about one GiB."""


class Refused(UserError):
    """Megatron itself refuses the recipe."""


def each(function: Callable[..., Any], calls: list[tuple[Any, ...]], *, refusals: bool = False) -> list[Any]:
    """Run `function(*call)` for each call in a process of its own and return the results; discard what they print.

    Args:
        refusals: return a UserError as its call's result instead of raising it.

    Raises:
        UserError, FieldError: the call raised one.
        Refused: Megatron raised an exception.
        RuntimeError: the call raised anything else; the message has its traceback.
    """
    results = []
    for some in batched(calls, AT_ONCE):
        for error, result in _together(function, some):
            if error is not None and not (refusals and isinstance(error, UserError)):
                raise error
            results.append(error or result)
    return results


def _together(function: Callable[..., Any], calls: tuple[tuple[Any, ...], ...]) -> list[tuple[Exception | None, Any]]:
    context = multiprocessing.get_context("fork")
    running = []
    for call in calls:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(theirs, function, call))
        process.start()
        theirs.close()
        running.append((process, ours))
    answers = [_receive(connection) for _, connection in running]
    for process, _ in running:
        process.join()
    return answers


def _receive(connection: Connection) -> tuple[Exception | None, Any]:
    try:
        kind, value = connection.recv()
    except EOFError:
        return RuntimeError("a process that planned a rank was ended"), None
    errors: dict[str, Callable[..., Exception]] = {
        "field": FieldError,
        "user": UserError,
        "refused": Refused,
        "failed": RuntimeError,
    }
    return (errors[kind](*value), None) if kind in errors else (None, value)


def _child(connection: Connection, function: Callable[..., Any], call: tuple[Any, ...]) -> None:
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        connection.send(_outcome(function, call))
        connection.close()
    os._exit(0)  # skip torch's cleanup: a fake process group has no other ranks


def _outcome(function: Callable[..., Any], call: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "result", function(*call)
    except FieldError as e:
        return "field", (e.field, e.message)
    except UserError as e:
        return "user", (str(e),)
    except (Exception, SystemExit) as e:
        raised_in = Path(traceback.extract_tb(e.__traceback__)[-1].filename).parts
        if "megatron" in raised_in or isinstance(e, SystemExit):
            return "refused", (f"Megatron refuses it: {str(e).strip() or type(e).__name__}",)
        return "failed", (traceback.format_exc(),)
