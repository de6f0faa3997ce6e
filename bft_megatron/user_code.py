"""A user's own module, which a recipe names: whatever goes wrong in it is an error of the user's, with its place."""

from __future__ import annotations

import contextlib
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import FrameType

from bft_megatron.errors import FieldError, UserError

INSTALLED = tuple(f"{sysconfig.get_path(name)}/" for name in ("stdlib", "purelib", "platlib"))
"""Folders of Python's own library and of the installed packages."""
NO_FAULT_OF_CODE = ("MemoryError", "OutOfMemoryError", "AcceleratorError")
"""Names of the exceptions that any code may meet: a lack of memory, and a device's, which comes late."""


def check_source(field: str, module: str) -> None:
    """Check that a module and the packages that hold it exist and have no syntax error, without running any of it.

    It may import torch, which takes seconds, or end the process.

    Raises:
        FieldError: one of them does not exist, or has an error.
    """
    with blamed(field, module):
        specs = _specs(module)
        if specs is None:
            raise FieldError(field, f"there is no module {module!r} here or among the installed packages")
        for origin in [spec.origin for spec in specs if spec.origin is not None and spec.origin.endswith(".py")]:
            compile(Path(origin).read_bytes(), origin, "exec", dont_inherit=True)


def _specs(module: str) -> list[ModuleSpec] | None:
    """Return where Python finds the packages around a module and the module itself; None if one of them is nowhere.

    A part is looked for under its own name, not the full one, for which Python would want its package imported.
    """
    top, *parts = module.split(".")
    found = [next(filter(None, (finder.find_spec(top, None) for finder in sys.meta_path)), None)]
    for part in parts:
        package = found[-1]
        places = None if package is None else package.submodule_search_locations
        found.append(None if places is None else PathFinder.find_spec(part, list(places)))
    specs = [spec for spec in found if spec is not None]
    return specs if len(specs) == len(found) else None


def is_missing(module: str, e: ModuleNotFoundError) -> bool:
    """Return whether it is the module or a package around it that was not found, and not one that it imports."""
    return e.name is not None and f"{module}.".startswith(f"{e.name}.")


@contextlib.contextmanager
def blamed(field: str, module: str) -> Iterator[None]:
    """Turn what code of a user's module raises into a FieldError with the file and line of the user's code.

    A lack of memory, a device's error and a failed collective are left as they are: they are no fault of the code.

    Args:
        field: the recipe's field that names the module.
        module: the module's full name.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as e:
        if type(e).__name__ in NO_FAULT_OF_CODE or _in_a_collective(e):
            raise
        raise FieldError(field, f"{_place(e, module)}: {_said(e)}") from e


def _said(e: BaseException) -> str:
    text = e.msg if isinstance(e, SyntaxError) else str(e).strip().partition("\n")[0]
    return f"{type(e).__name__}: {text}" if text else type(e).__name__


def _place(e: BaseException, module: str) -> str:
    """Return `file:line` of the innermost line of the user's code; the module's name if none of it was running."""
    if isinstance(e, SyntaxError) and e.filename and not e.filename.startswith("<"):
        return f"{e.filename}:{e.lineno}"
    lines = [(f.f_code.co_filename, line) for f, line in traceback.walk_tb(e.__traceback__) if _is_users(f, module)]
    return "{}:{}".format(*lines[-1]) if lines else module


def _is_users(frame: FrameType, module: str) -> bool:
    """Return whether a frame runs code of the user's package, or of a file that is neither installed nor ours."""
    package, file = _module(frame).partition(".")[0], frame.f_code.co_filename
    return package == module.partition(".")[0] or not (package == "bft_megatron" or file.startswith(("<", *INSTALLED)))


def _in_a_collective(e: BaseException) -> bool:
    return any(_module(frame).startswith("torch.distributed") for frame, _ in traceback.walk_tb(e.__traceback__))


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
