"""Reading a file's rows in chunks, small enough to hold in memory and large enough to hand to another process.

JSON Lines, JSON, CSV and TSV are parsed here, compressed or not, so that an error can name the line; Parquet and Arrow
are read through pyarrow, as in `datasets`. Converting a row to a conversation is in `formats`.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import batched, count
from typing import TYPE_CHECKING, Any, BinaryIO

from bft_megatron.errors import UserError
from bft_megatron.reading.compression import compression, open_plain, suffix
from bft_megatron.reading.json_lists import BLOCK, items_of, too_long

if TYPE_CHECKING:
    import pyarrow

CHUNK_ROWS = 256
CHUNK_BYTES = 1 << 22  # of text; a chunk that exceeds it ends early


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a file.

    Attributes:
        path: the file's path.
        file: the file's index among the source's files.
        numbers: number of each line or row, from 1.
        rows: a table, or a list of lines as bytes, JSON values, and errors of rows that are too long.
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


def read_jsonl(path: str, file: int, most: int) -> Iterator[Chunk]:
    """Read JSON Lines: one value per line."""
    with open_plain(path) as lines:
        first, held, size = 1, list[Any](), 0
        while line := lines.readline(most + 2):
            if len(line.rstrip(b"\r\n")) > most:
                _pass_line(lines, line)
                held.append(too_long(most, f"{path}:{first + len(held)}"))
            else:
                held.append(line)
                size += len(line)
            if len(held) == CHUNK_ROWS or size > CHUNK_BYTES:
                yield Chunk(path, file, range(first, first + len(held)), held)
                first, held, size = first + len(held), [], 0
        if held:
            yield Chunk(path, file, range(first, first + len(held)), held)


def _pass_line(lines: BinaryIO, begun: bytes) -> None:
    while begun and not begun.endswith(b"\n"):
        begun = lines.readline(BLOCK)


def read_json(path: str, file: int, most: int) -> Iterator[Chunk]:
    """Read a JSON list of values, a block at a time; a file that begins with anything else is read as JSON Lines."""
    with open_plain(path) as content:
        is_list = re.match(rb"(\xef\xbb\xbf)?\s*\[", content.read(4096)) is not None
    if not is_list:
        yield from read_jsonl(path, file, most)
        return
    for items in batched(items_of(path, most), CHUNK_ROWS):
        yield Chunk(path, file, [line for line, _ in items], [value for _, value in items])


def read_csv(path: str, file: int, most: int, delimiter: str = ",") -> Iterator[Chunk]:
    """Read CSV whose first line names the columns. All cells are text; empty ones are left out of the row.

    A row that is too long ends the reading: where it ends depends on its quotes, one of which may be left open.
    """
    csv.field_size_limit(sys.maxsize)
    last, size = 0, 0  # the last line of the last whole row; bytes read since

    def decoded() -> Iterator[str]:
        nonlocal size
        with open_plain(path) as lines:
            for number in count(1):
                line = lines.readline(most + 1)
                size += len(line)
                if size > most:
                    raise too_long(most, f"{path}:{last + 1}", ", or close its quote")
                if not line:
                    return
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as e:
                    raise UserError(f"not UTF-8 at byte {e.start + 1} of the line", f"{path}:{number}") from None

    def rows() -> Iterator[tuple[int, Any]]:
        nonlocal last, size
        reader = csv.DictReader(decoded(), restkey="\0rest", strict=True, delimiter=delimiter)
        try:
            last, size = len(reader.fieldnames or ()) and 1, 0
            for row in reader:
                first, last, size = last + 1, reader.line_num, 0
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


def read_tsv(path: str, file: int, most: int) -> Iterator[Chunk]:
    """Read TSV: CSV with tabs between the cells."""
    yield from read_csv(path, file, most, "\t")


def read_parquet(path: str, file: int, most: int) -> Iterator[Chunk]:
    """Read Parquet, a batch of rows at a time. A batch is in memory before its rows can be measured."""
    from pyarrow import ArrowException, OSFile, parquet

    first = 1
    try:
        with OSFile(path) as source:
            for batch in parquet.ParquetFile(source).iter_batches(CHUNK_ROWS):
                yield from _cut(Chunk(path, file, range(first, first + len(batch)), batch, "row"), most)
                first += len(batch)
    except (ArrowException, OSError) as e:
        raise UserError(f"not Parquet that can be read: {_first_line(e)}", path) from None


def _parquet_rows(path: str) -> int:
    from pyarrow import ArrowException, parquet

    try:
        return int(parquet.read_metadata(path).num_rows)
    except ArrowException:  # reported when the file is read
        return 0


def read_arrow(path: str, file: int, most: int) -> Iterator[Chunk]:
    """Read an Arrow stream, as `datasets` saves it."""
    from pyarrow import ArrowException, ipc, memory_map

    first = 1
    try:
        with memory_map(path) as source:
            for batch in ipc.open_stream(source):
                for start in range(0, len(batch), CHUNK_ROWS):
                    part = batch.slice(start, CHUNK_ROWS)
                    yield from _cut(Chunk(path, file, range(first, first + len(part)), part, "row"), most)
                    first += len(part)
    except (ArrowException, OSError) as e:
        raise UserError(f"not an Arrow stream that can be read: {_first_line(e)}", path) from None


def _cut(chunk: Chunk, most: int) -> Iterator[Chunk]:
    """Yield the rows of a table in chunks of not too many bytes, and the error of each row that is too long."""
    rows, numbers = chunk.rows, chunk.numbers
    assert not isinstance(rows, list)
    if rows.nbytes <= min(most, CHUNK_BYTES):
        yield chunk
        return
    start, size = 0, 0
    for at in range(len(rows)):
        row = _row_bytes(rows.slice(at, 1))
        if at > start and (size + row > CHUNK_BYTES or row > most):
            yield replace(chunk, numbers=numbers[start:at], rows=_copied(rows, start, at))
            start, size = at, 0
        size += row
        if row > most:
            yield replace(chunk, numbers=numbers[at : at + 1], rows=[too_long(most, chunk.place(numbers[at]))])
            start, size = at + 1, 0
    if start < len(rows):
        yield replace(chunk, numbers=numbers[start:], rows=_copied(rows, start, len(rows)))


def _copied(rows: pyarrow.RecordBatch, start: int, end: int) -> pyarrow.RecordBatch:
    """Return a slice that holds its own bytes alone; another would take the whole batch along to another process."""
    return rows.take(list(range(start, end)))


def _row_bytes(row: pyarrow.RecordBatch) -> int:
    from pyarrow import DictionaryArray

    return sum((c.dictionary_decode() if isinstance(c, DictionaryArray) else c).nbytes for c in row.columns)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


READERS: dict[str, Callable[[str, int, int], Iterator[Chunk]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
"""Reader by the suffix of what a file holds."""


def reader_of(path: str) -> Callable[[str, int, int], Iterator[Chunk]]:
    """Return a file's reader. A file that the recipe names itself may have another suffix: it is JSON Lines."""
    return READERS.get(suffix(path), read_jsonl)


def read_file(path: str, file: int, most: int) -> Iterator[Chunk]:
    """Yield the chunks of a file, read by its suffix.

    Args:
        file: index of the file among the source's files.
        most: bytes of the longest row (`data.max_row_bytes`). A longer one is not parsed: its value is a UserError.

    Raises:
        UserError: the content is not what the suffix says, or a CSV row is too long; faults in JSON Lines are in the
            chunks instead.
        OSError: the file cannot be read.
    """
    yield from reader_of(path)(path, file, most)


def count_rows(files: tuple[str, ...]) -> int | None:
    """Return about how many rows the files hold, for a progress bar, or None if that takes reading them."""
    total = 0
    for path in files:
        if suffix(path) == ".parquet":
            total += _parquet_rows(path)
        elif suffix(path) in (".json", ".arrow") or compression(path):
            return None
        else:
            with open(path, "rb") as file:
                total += sum(block.count(b"\n") for block in iter(lambda: file.read(BLOCK), b""))
    return total
