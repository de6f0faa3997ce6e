"""Megatron's arguments, parsed from a list of flags."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from bft_megatron.errors import FieldError
from bft_megatron.upstream.change import Change

PARSE = Change(
    "megatron.training.arguments:parse_and_validate_args",
    "internal",
    "It makes the global arguments, which nearly all code below `pretrain` reads whatever configuration object it is "
    "given. It reads `sys.argv`, which is set for the call.",
    "it takes a list, or the loop takes its configuration objects alone",
    "tests/upstream/test_small_changes.py",
    (),
)


def parse(flags: list[str]) -> Any:
    """Parse and validate flags; return Megatron's arguments, which also become its global ones.

    Raises:
        FieldError: as in `refusals`.
    """
    from megatron.training.arguments import parse_and_validate_args

    before, sys.argv = sys.argv, ["bft-megatron", *flags]
    try:
        with refusals():
            return parse_and_validate_args()
    finally:
        sys.argv = before


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turn what Megatron raises of its flags and configurations into an error of the recipe.

    Raises:
        FieldError: Megatron refuses a flag's value, or flags together. Its own words and the traceback go to stderr.
        OSError, MemoryError: as they are, for no flag is at fault.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except (OSError, MemoryError):
        raise
    except (Exception, SystemExit) as e:
        traceback.print_exc()
        raise _refusal(e, said.getvalue()) from None
    finally:
        sys.stderr.write(said.getvalue())


def _refusal(e: BaseException, said: str) -> FieldError:
    """Return the error for the recipe: argparse exits and prints its reason last, Megatron's own checks raise."""
    if not isinstance(e, SystemExit):
        reason = str(e).strip().partition("\n")[0] or type(e).__name__
        return FieldError("megatron", f"Megatron refuses the run's flags: {reason}")
    last = (said.strip().splitlines() or ["it does not say why"])[-1].partition("error: ")[2]
    argument = re.fullmatch(r"argument --([\w-]+): (.*)", last)
    return FieldError(f"megatron.{argument[1]}", argument[2]) if argument else FieldError("megatron", last)
