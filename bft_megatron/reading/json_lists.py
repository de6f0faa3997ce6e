"""Reading the values of a JSON list one after the other, from a file that may be larger than memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from io import TextIOWrapper
from typing import Any, TextIO

from bft_megatron.errors import UserError
from bft_megatron.reading.compression import open_plain

BLOCK = 1 << 20
"""Bytes or characters that are read at a time."""

_DECODER = json.JSONDecoder()
_LONGEST_TOKEN = 16  # characters before the window's end in which a cut shows as a fault: -Infinity, \\ud83d\\ude42
_SPACE = re.compile(r"\s*")
_OUTSIDE, _INSIDE, _QUOTED = re.compile(r'["\[\]{},]'), re.compile(r'["\[\]{}]'), re.compile(r'\\.|"', re.DOTALL)


def items_of(path: str, most: int) -> Iterator[tuple[int, Any]]:
    """Yield the values of a JSON list, each with its first line. Holds one block and the value that crosses its end.

    Args:
        most: bytes of the longest value; in the place of a longer one stands its UserError.

    Raises:
        UserError: the file is not a JSON list in UTF-8.
    """
    with TextIOWrapper(open_plain(path), encoding="utf-8-sig", newline="") as file:
        window = _Window(file, path)
        window.pass_space()
        window.pass_to(window.at + 1)  # the list's bracket
        while window.pass_space() != "]":
            line = window.line
            yield line, window.value(most)
            if window.pass_space() == ",":
                window.pass_to(window.at + 1)
            elif window.next() != "]":
                raise UserError("not JSON: a comma or the list's end is missing", f"{path}:{window.line}")


def too_long(most: int, where: str, way: str = "") -> UserError:
    """Return the error of a row of more than `most` bytes; `way` is a further way to mend it."""
    return UserError(f"the row is longer than data.max_row_bytes, {most:,} bytes: cut it{way}, or raise that", where)


class _Window:
    """A part of a file's text.

    Attributes:
        text: the part.
        at: place of the next character in it.
        line: the line of that character.
    """

    def __init__(self, file: TextIO, path: str) -> None:
        self.file, self.path = file, path
        self.text, self.at, self.line = "", 0, 1

    def next(self) -> str:
        """Return the next character, "" at the window's end."""
        return self.text[self.at : self.at + 1]

    def pass_to(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def more(self, size: int) -> bool:
        """Drop what was passed and read on; return False at the file's end."""
        try:
            read = self.file.read(size)
        except UnicodeDecodeError:
            raise UserError("not UTF-8 on this line or a later one", f"{self.path}:{self.line}") from None
        self.text, self.at = self.text[self.at :] + read, 0
        return bool(read)

    def pass_space(self) -> str:
        """Pass white space; return the next character, "" at the end of the file."""
        while True:
            passed = _SPACE.match(self.text, self.at)
            assert passed is not None, "the pattern matches no characters too"
            self.pass_to(passed.end())
            if self.at < len(self.text) or not self.more(BLOCK):
                return self.next()

    def value(self, most: int) -> Any:
        """Return the next value and pass it; a UserError in its place if it is too long."""
        where, wanted = f"{self.path}:{self.line}", BLOCK
        while True:
            value, end = self.decoded(where)
            too_many = end - self.at > most
            if too_many or (4 * (end - self.at) > most and len(self.text[self.at : end].encode()) > most):
                self.pass_value()
                return too_long(most, where)
            if end < len(self.text):  # a number that ends with the window may go on behind it
                break
            if not self.more(min(wanted, most + 1)):
                value, end = self.decoded(where, cut=False)
                break
            wanted *= 2
        self.pass_to(end)
        return value

    def decoded(self, where: str, cut: bool = True) -> tuple[Any, int]:
        """Return the next value and where it ends; None and the window's end if the value is cut there."""
        try:
            return _DECODER.raw_decode(self.text, self.at)
        except json.JSONDecodeError as e:
            if cut and (e.msg.startswith("Unterminated string") or e.pos > len(self.text) - _LONGEST_TOKEN):
                return None, len(self.text)
            line = self.line + self.text.count("\n", self.at, e.pos)
            raise UserError(f"not JSON: {e.msg}", f"{self.path}:{line}") from None
        except (RecursionError, ValueError) as e:  # too deeply nested, or a number of thousands of digits
            raise UserError(f"not JSON that can be read: {e}", where) from None

    def pass_value(self) -> None:
        """Pass the next value without parsing it, to the comma or bracket behind it."""
        depth, quoted = 0, False
        while True:
            end = self.at
            while found := (_QUOTED if quoted else _INSIDE if depth else _OUTSIDE).search(self.text, end):
                edge, end = found[0], found.end()
                if edge == '"':
                    quoted = not quoted
                elif quoted:  # an escape
                    continue
                elif edge in "[{":
                    depth += 1
                elif depth == 0:
                    self.pass_to(found.start())
                    return
                else:
                    depth -= 1
            begun = quoted and self.text.endswith("\\") and end < len(self.text)  # an escape that the window cuts
            self.pass_to(len(self.text) - begun)
            if not self.more(BLOCK):
                self.pass_to(len(self.text))
                return
