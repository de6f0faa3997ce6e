"""The error that a user can cause and mend (bad recipe, bad data, missing file), and the one that nobody should retry.

The command line prints its message without a traceback and exits with status 2; everything else is a bug and keeps its
traceback.
"""

from __future__ import annotations

USER_ERROR = 2
"""Exit status where the input is at fault."""

BAD_STEPS = 65
"""Exit status where too many steps in a row were skipped; starting again would meet the same."""


class UserError(Exception):
    """Something in the user's input is wrong.

    Args:
        message: what is wrong and what to do about it.
        where: the place, as `file:line: field` or the part of it that is known.
    """

    def __init__(self, message: str, where: str = "") -> None:
        super().__init__(f"{where}: {message}" if where else message)


class FieldError(UserError):
    """A recipe's field has a value that cannot be; whoever knows the recipe's file adds its line."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message, field)
        self.field, self.message = field, message


class BadSteps(Exception):
    """The gradient was not finite in too many steps in a row; the last good checkpoint is untouched."""
