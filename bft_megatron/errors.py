"""The one error that a user can cause and mend: bad recipe, bad data, missing file.

The command line prints its message without a traceback and exits with status 2; everything else is a bug and keeps its
traceback.
"""

from __future__ import annotations


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
