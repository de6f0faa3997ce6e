"""Errors in the user's input (bad recipe, bad data, missing file), and the error after which a run must not restart.

For a UserError the command line prints the message without a traceback and exits with status 2. Any other exception is
a bug and keeps its traceback.
"""

from __future__ import annotations

USER_ERROR = 2
"""Exit status after an error in the user's input."""

BLOWN_UP = 65
"""Exit status of a run that blew up: a restart would meet the same."""


class UserError(Exception):
    """An error in the user's input.

    Args:
        message: what is wrong and what to do about it.
        where: the place, as `file:line: field` or the known part of it.
    """

    def __init__(self, message: str, where: str = "") -> None:
        super().__init__(f"{where}: {message}" if where else message)


class FieldError(UserError):
    """An invalid value of a recipe's field. Code that knows the recipe's file adds the field's line."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message, field)
        self.field, self.message = field, message


class BlownUp(Exception):
    """Gradients, validations or parameters that are not finite and do not recover. All ranks raise it together.

    Nothing of it was saved: the checkpoints are those of the steps before.
    """


class Unreadable(Exception):
    """A file of a checkpoint could not be read, for a reason that is not its content. Nothing was changed.

    All ranks raise it with the same message.
    """
