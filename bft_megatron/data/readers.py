"""Reading a file's rows in chunks, small enough to hold in memory and large enough to hand to another process.

JSON Lines, JSON and CSV are parsed here, so that an error can name the line; Parquet and Arrow are read through
pyarrow, as in `datasets`. Converting a row to a conversation is in `formats`.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from bft_megatron.errors import UserError

if TYPE_CHECKING:
    import pyarrow

CHUNK_ROWS = 256
CHUNK_BYTES = 1 << 22  # of text; a chunk that exceeds it ends early
BLOCK = 1 << 20


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a file.

    Attributes:
        path: the file's path.
        file: the file's index among the source's files.
        numbers: number of each line or row, from 1.
        rows: lines as bytes, JSON values, or a table.
        unit: what is numbered: line or row.
    """

    path: str
    file: int
    numbers: range | list[int]
    rows: list[Any] | pyarrow.RecordBatch
    unit: str = "line"

    def place(self, number: int) -> str:
        """Return the place of a row, for errors."""
        return f"{self.path}:{number}" if self.unit == "line" else f"{self.path}: row {number}"

    def __iter__(self) -> Iterator[tuple[int, str, Any]]:
        """Yield number, place and value of each non-blank row; if a row cannot be read, its value is a UserError."""
        rows = self.rows if isinstance(self.rows, list) else self.rows.to_pylist()
        for number, row in zip(self.numbers, rows, strict=True):
            where = self.place(number)
            if not isinstance(row, bytes):
                yield number, where, row
            elif row.strip():
                yield number, where, _parse(row, where)


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        return UserError(f"not UTF-8 at byte {e.start + 1} of the line", where)
    except json.JSONDecodeError as e:
        return UserError(f"not JSON: {e.msg} at column {e.colno}", where)
    except (RecursionError, ValueError) as e:  # too deeply nested, or a number of thousands of digits
        return UserError(f"not JSON that can be read: {e}", where)


def read_jsonl(path: str, file: int) -> Iterator[Chunk]:
    """Read JSON Lines: one value per line."""
    with open(path, "rb") as lines:
        first, held, size = 1, [], 0
        for line in lines:
            held.append(line)
            size += len(line)
            if len(held) == CHUNK_ROWS or size > CHUNK_BYTES:
                yield Chunk(path, file, range(first, first + len(held)), held)
                first, held, size = first + len(held), [], 0
        if held:
            yield Chunk(path, file, range(first, first + len(held)), held)


def read_json(path: str, file: int) -> Iterator[Chunk]:
    """Read a JSON list of values, a block at a time; a file that begins with anything else is read as JSON Lines."""
    with open(path, "rb") as content:
        is_list = re.match(rb"(\xef\xbb\xbf)?\s*\[", content.read(4096)) is not None
    if not is_list:
        yield from read_jsonl(path, file)
        return
    for items in batched(_items(path), CHUNK_ROWS):
        yield Chunk(path, file, [line for line, _ in items], [value for _, value in items])


def _items(path: str) -> Iterator[tuple[int, Any]]:
    """Yield the values of a JSON list, each with its first line. Holds one block and the value that crosses its end."""
    decoder, space = json.JSONDecoder(), re.compile(r"[\s]*")
    with open(path, encoding="utf-8-sig", newline="") as file:
        text, at, line, wanted = "", 0, 1, BLOCK

        def skip() -> str:
            """Skip white space, reading on if the text ends; return the next character, "" at the end of the file."""
            nonlocal text, at, line
            while True:
                passed = space.match(text, at)
                assert passed is not None, "the pattern matches no characters too"
                end = passed.end()
                line += text.count("\n", at, end)
                at = end
                if at < len(text) or not (more := _read(file, BLOCK, path, line)):
                    return text[at : at + 1]
                text, at = more, 0

        skip()
        at += 1  # the list's bracket
        while (found := skip()) != "]":
            fault: ValueError | None = None
            try:
                value, end = decoder.raw_decode(text, at)
                cut = end == len(text)  # a number may continue in the next block
            except RecursionError as e:
                raise UserError(f"not JSON that can be read: {e}", f"{path}:{line}") from None
            except ValueError as e:
                cut, fault = True, e
            if cut:
                more = _read(file, wanted, path, line)
                text, at, wanted = text[at:] + more, 0, wanted * 2
                if more:
                    continue
                if fault or not found:
                    message = getattr(fault, "msg", "the list does not end")
                    at_line = line + text.count("\n", 0, getattr(fault, "pos", 0))
                    raise UserError(f"not JSON: {message}", f"{path}:{at_line}")
            yield line, value
            line += text.count("\n", at, end)
            at, wanted = end, BLOCK
            if skip() == ",":
                at += 1
            elif text[at : at + 1] != "]":
                raise UserError("not JSON: a comma or the list's end is missing", f"{path}:{line}")


def _read(file: TextIO, size: int, path: str, line: int) -> str:
    try:
        return file.read(size)
    except UnicodeDecodeError:
        raise UserError("not UTF-8 on this line or a later one", f"{path}:{line}") from None


def read_csv(path: str, file: int) -> Iterator[Chunk]:
    """Read CSV whose first line names the columns. All cells are text; empty ones are left out of the row."""
    csv.field_size_limit(sys.maxsize)

    def decoded() -> Iterator[str]:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as e:
                    raise UserError(f"not UTF-8 at byte {e.start + 1} of the line", f"{path}:{number}") from None

    def rows() -> Iterator[tuple[int, Any]]:
        reader = csv.DictReader(decoded(), restkey="\0rest", strict=True)
        last = 1
        try:
            for row in reader:
                first, last = last + 1, reader.line_num
                where = f"{path}:{first}"
                if "\0rest" in row or None in row.values():
                    yield (
                        first,
                        UserError(f"must have {len(reader.fieldnames or ())} cells, as the first line has", where),
                    )
                else:
                    yield first, {name: cell for name, cell in row.items() if cell != ""}
        except csv.Error as e:
            raise UserError(f"not CSV: {e}", f"{path}:{last + 1}") from None

    for items in batched(rows(), CHUNK_ROWS):
        yield Chunk(path, file, [line for line, _ in items], [row for _, row in items])


def read_parquet(path: str, file: int) -> Iterator[Chunk]:
    """Read Parquet, a batch of rows at a time."""
    from pyarrow import ArrowException, OSFile, parquet

    first = 1
    try:
        with OSFile(path) as source:
            for batch in parquet.ParquetFile(source).iter_batches(CHUNK_ROWS):
                yield Chunk(path, file, range(first, first + len(batch)), batch, "row")
                first += len(batch)
    except (ArrowException, OSError) as e:
        raise UserError(f"not Parquet that can be read: {_first_line(e)}", path) from None


def _parquet_rows(path: str) -> int:
    from pyarrow import ArrowException, parquet

    try:
        return int(parquet.read_metadata(path).num_rows)
    except ArrowException:  # reported when the file is read
        return 0


def read_arrow(path: str, file: int) -> Iterator[Chunk]:
    """Read an Arrow stream, as `datasets` saves it."""
    from pyarrow import ArrowException, ipc, memory_map

    first = 1
    try:
        with memory_map(path) as source:
            for batch in ipc.open_stream(source):
                for start in range(0, len(batch), CHUNK_ROWS):
                    part = batch.slice(start, CHUNK_ROWS)
                    yield Chunk(path, file, range(first, first + len(part)), part, "row")
                    first += len(part)
    except (ArrowException, OSError) as e:
        raise UserError(f"not an Arrow stream that can be read: {_first_line(e)}", path) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


READERS: dict[str, Callable[[str, int], Iterator[Chunk]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
"""Reader by file suffix. A file that the recipe names itself and that has another suffix is read as JSON Lines."""


def read_file(path: str, file: int) -> Iterator[Chunk]:
    """Yield the chunks of a file, read by its suffix.

    Raises:
        UserError: the content is not what the suffix says; faults in JSON Lines are in the chunks instead.
        OSError: the file cannot be read.
    """
    yield from READERS.get(Path(path).suffix.lower(), read_jsonl)(path, file)


def count_rows(files: tuple[str, ...]) -> int | None:
    """Return about how many rows the files hold, for a progress bar, or None if that takes reading them."""
    total = 0
    for path in files:
        suffix = Path(path).suffix.lower()
        if suffix == ".parquet":
            total += _parquet_rows(path)
        elif suffix in (".json", ".arrow"):
            return None
        else:
            with open(path, "rb") as file:
                total += sum(block.count(b"\n") for block in iter(lambda: file.read(BLOCK), b""))
    return total
