"""Rows of a file, in chunks that are small enough to hold and large enough to hand to another process.

JSON Lines, JSON and CSV are read here, so that an error can name the line; Parquet and Arrow through pyarrow, as
`datasets` does. What a row means is in `formats`.
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
CHUNK_BYTES = 1 << 22  # of text, after which a chunk ends early
BLOCK = 1 << 20


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a file.

    Attributes:
        path: the file's.
        file: its number among the source's files.
        numbers: of lines or rows, from 1.
        rows: bytes of lines, JSON values, or a table.
        unit: what the numbers count.
    """

    path: str
    file: int
    numbers: range | list[int]
    rows: list[Any] | pyarrow.RecordBatch
    unit: str = "line"

    def place(self, number: int) -> str:
        """Where a row is, for errors."""
        return f"{self.path}:{number}" if self.unit == "line" else f"{self.path}: row {number}"

    def __iter__(self) -> Iterator[tuple[int, str, Any]]:
        """Number, place and value of each row that is not blank; a value may be an error in its place."""
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
    except (RecursionError, ValueError) as e:  # nested too deeply; a number of thousands of digits
        return UserError(f"not JSON that can be read: {e}", where)


def read_jsonl(path: str, file: int) -> Iterator[Chunk]:
    """JSON Lines: a value a line."""
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
    """A JSON list of values, a block at a time; a file that begins otherwise holds JSON Lines."""
    with open(path, "rb") as content:
        is_list = re.match(rb"(\xef\xbb\xbf)?\s*\[", content.read(4096)) is not None
    if not is_list:
        yield from read_jsonl(path, file)
        return
    for items in batched(_items(path), CHUNK_ROWS):
        yield Chunk(path, file, [line for line, _ in items], [value for _, value in items])


def _items(path: str) -> Iterator[tuple[int, Any]]:
    """Values of a JSON list, each with the line that it begins on. Holds a block and the value that it ends in."""
    decoder, space = json.JSONDecoder(), re.compile(r"[\s]*")
    with open(path, encoding="utf-8-sig", newline="") as file:
        text, at, line, wanted = "", 0, 1, BLOCK

        def skip() -> str:
            """Pass white space, reading on where the text ends; the next character, none at the end of the file."""
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
                cut = end == len(text)  # a number may go on
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
    """CSV whose first line names the columns. All cells are text; an empty one is none."""
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
    """Parquet, a batch of rows at a time."""
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
    except ArrowException:  # said when it is read
        return 0


def read_arrow(path: str, file: int) -> Iterator[Chunk]:
    """An Arrow stream, as `datasets` saves it."""
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
"""By the file's suffix; whatever has another one is taken for JSON Lines where the recipe names the file itself."""


def read_file(path: str, file: int) -> Iterator[Chunk]:
    """The chunks of a file, by its suffix.

    Raises:
        UserError: a file that is not what its suffix says; a JSON Lines file's faults are in its chunks.
        OSError: it cannot be read.
    """
    yield from READERS.get(Path(path).suffix.lower(), read_jsonl)(path, file)


def count_rows(files: tuple[str, ...]) -> int | None:
    """About how many rows the files hold, for a progress bar; None where only reading them would tell."""
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
