"""Limits of a field's value, kept with the field in its dataclass: the range of a number, or that text is a path.

NaN and infinity are in no range. Imports no torch.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import Any

from bft_megatron.errors import FieldError, shortened

INT32 = 2**31 - 1
"""Most of a whole number: Megatron and its libraries keep some as a C int, and the product of two fits an int64."""

_KEY = "limits"  # of a field's metadata


@dataclass(frozen=True)
class Range:
    """The finite numbers between two bounds, of which `above` and `below` are themselves outside."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    def __str__(self) -> str:
        """Return the bounds in words, such as `at least 0 and below 1`."""
        return " and ".join(
            f"{name.replace('_', ' ')} {bound:,}" for name, bound in vars(self).items() if bound is not None
        )

    def fault(self, value: float, shown: str = "") -> str | None:
        """Return what a number must be and isn't; None if it is in the range.

        Args:
            shown: the number as its author wrote it.
        """
        shown = shown or shortened(value)
        if not isinstance(value, int) and not math.isfinite(value):
            return f"must be finite and {self}, not {shown}"
        inside = (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )
        return None if inside else f"must be {self}, not {shown}"


@dataclass(frozen=True)
class FilePath:
    """Text that names a file or folder, whether or not there is one."""

    def fault(self, value: str) -> str | None:
        """Return why no file or folder can have a name; None if one can."""
        if not value.strip():
            return "must not be empty"
        if value.startswith("~"):
            home = value.partition("/")[0]
            return f"no home folder is known for {shortened(home)}; a file of that name is ./{shortened(value)}"
        try:
            os.stat(value)
        except OSError as e:
            possible = e.errno in (errno.ENOENT, errno.ENOTDIR)
            return None if possible else f"cannot be used as a path: {e.strerror}"
        except ValueError as e:  # a NUL character, half a surrogate pair
            return f"cannot be used as a path: {shortened(e)}"
        return None


PATH = {_KEY: FilePath()}
"""Metadata of a dataclass's field that is the path of a file or folder."""


def limited(limit: Range, default: Any = MISSING, default_factory: Callable[[], Any] | Any = MISSING) -> Any:
    """Return a dataclass field of a number in a range."""
    if default_factory is not MISSING:
        return field(default_factory=default_factory, metadata={_KEY: limit})
    return field(default=default, metadata={_KEY: limit})


def number(default: Any, **bounds: float) -> Any:
    """Return a dataclass field of a number with the bounds of a `Range`."""
    return limited(Range(**bounds), default)


def count(default: Any, at_least: int = 1) -> Any:
    """Return a dataclass field of a whole number."""
    return limited(Range(at_least=at_least, at_most=INT32), default)


def limit_of(settings: type, name: str) -> Range | FilePath | None:
    """Return the limit of a dataclass's field; None if it has none."""
    found: Range | FilePath | None = next(f for f in fields(settings) if f.name == name).metadata.get(_KEY)
    return found


def check(settings: Any, prefix: str = "") -> None:
    """Raise FieldError for the first value outside its field's limit, in a dataclass or in those that it holds.

    Args:
        settings: a recipe, or a group of its fields.
        prefix: the group's name and a dot.
    """
    for f in fields(settings):
        value, limit = getattr(settings, f.name), f.metadata.get(_KEY)
        if is_dataclass(value):
            check(value, f"{prefix}{f.name}.")
        elif limit is not None and value is not None and (fault := limit.fault(value)):
            raise FieldError(f"{prefix}{f.name}", fault)


def home_path(path: str) -> str:
    """Return a path with the home folder's for `~` and `~user`; unchanged if there is no such user."""
    try:
        return os.path.expanduser(path)
    except ValueError:  # a NUL character, half a surrogate pair
        return path


def at_home[T](settings: T) -> T:
    """Return a recipe, or a group of its fields, with `home_path` of every path in it."""
    changed: dict[str, Any] = {}
    for f in fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, f.name)
        if is_dataclass(value):
            changed[f.name] = at_home(value)
        elif isinstance(f.metadata.get(_KEY), FilePath) and value is not None:
            changed[f.name] = home_path(value)
    return replace(settings, **changed)  # type: ignore[type-var]
