"""The errors that end a command in one line: of the user's input, of the file system, of a run that blew up, of a
folder in use.

For a UserError (bad recipe, bad data, missing file) the command line exits with status 2. Any other exception is a bug
and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

USER_ERROR = 2
"""Exit status after an error in the user's input."""

BLOWN_UP = 65
"""Exit status of a run that blew up: a restart would meet the same."""

IN_USE = 73
"""Exit status of a command whose folder another command uses: nothing was changed, and a later start may succeed."""


class UserError(Exception):
    """An error in the user's input.

    Args:
        message: what is wrong and what to do about it.
        where: the place, as `file:line: field` or the known part of it.
    """

    def __init__(self, message: str, where: str = "") -> None:
        super().__init__("\n".join(map(_printable, (f"{where}: {message}" if where else message).split("\n"))))


class FieldError(UserError):
    """An invalid value of a recipe's field. Code that knows the recipe's file adds the field's line."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message, field)
        self.field, self.message = field, message


class BlownUp(Exception):
    """Gradients, validations or parameters that are not finite and do not recover. All ranks raise it together.

    Nothing of it was saved: the checkpoints are those of the steps before.
    """


class InUse(Exception):
    """Another command uses a folder."""


class Unreadable(Exception):
    """A file of a run could not be read, for a reason that is not its content. Nothing was changed.

    Of a checkpoint, all ranks raise it with the same message.
    """

    @classmethod
    def of(cls, file: Path, error: OSError) -> Unreadable:
        """Return the error of a file that the system did not let this process read."""
        return cls(f"cannot read {file}: {error.strerror or error}; nothing was changed, the same command tries again")


def status(error: BaseException) -> int:
    """Return the exit status of a command that an error ends."""
    kinds = {UserError: USER_ERROR, BlownUp: BLOWN_UP, InUse: IN_USE}
    return next((number for kind, number in kinds.items() if isinstance(error, kind)), 1)


@contextmanager
def reading(place: str, field: str = "") -> Iterator[None]:
    """Turn whatever goes wrong while something of the user's is read into a UserError of one line.

    Args:
        place: the file, `file:line: field`, or the override that is being read.
        field: the recipe's field that names the file; the error is a FieldError then.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        if field:
            raise FieldError(field, f"cannot read {shortened(place, 200)}: {reason(e)}") from None
        raise UserError(f"cannot be read: {reason(e)}", shortened(place, 200)) from None


def reason(error: Exception) -> str:
    """Return in a few words why something could not be read."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 at byte {error.start + 1}: save it as UTF-8"
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    if isinstance(error, OSError):
        return error.strerror or shortened(error, 200)
    said = shortened(str(error).strip().partition("\n")[0], 200)
    if said.startswith("Exceeds the limit"):  # Python's, of an integer's digits
        return "it has a number of thousands of digits"
    return said if said and isinstance(error, ValueError) else f"{type(error).__name__} {said}".strip()


def shortened(value: object, most: int = 60) -> str:
    """Return a value as text of at most so many characters, on one line."""
    text = _printable(str(value))
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def _printable(text: str) -> str:
    """Return text with its control characters and halves of surrogate pairs as escapes, which any terminal shows."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
