"""The lines of metrics.jsonl: one JSON object for each step and each validation.

The file is only a report: a line that is damaged is set aside and never stops a run.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def read(file: Path) -> list[dict[str, Any]]:
    """Return the good lines of metrics.jsonl in their order; none if there is no file."""
    return [line for _, line in _lines(file) if line is not None]


def drop_after(file: Path, step: int) -> str | None:
    """Drop the lines of steps after `step`: a resumed run repeats them, and they must not appear twice.

    Before the first step the file becomes empty, because the first validation is repeated too. Damaged lines are
    appended to metrics.rejected.jsonl beside it; the others keep their bytes.

    Returns: a sentence about the damaged lines, or None if there are none.
    """
    lines = _lines(file)
    kept = [content for content, line in lines if line is not None and step and line["iteration"] <= step]
    bad = {number: content for number, (content, line) in enumerate(lines, start=1) if line is None}
    if bad:
        with rejected(file).open("ab") as aside:
            aside.writelines(bad.values())
    if lines and (content := b"".join(kept)) != file.read_bytes():
        temporary = file.with_suffix(".tmp")
        temporary.write_bytes(content)
        temporary.replace(file)
    return _sentence(file, list(bad)) if bad else None


def rejected(file: Path) -> Path:
    """Return the file of the damaged lines."""
    return file.with_suffix(f".rejected{file.suffix}")


def _lines(file: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """Return each line's bytes with its newline, and what it says, or None if it is damaged."""
    content = file.read_bytes() if file.exists() else b""
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    return [(line + b"\n", _parsed(line)) for line in lines]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError):  # half a line, if a process was killed while writing
        return None
    good = isinstance(value, dict) and type(value.get("iteration")) is int and _numbers(value)
    return value if good else None


def _numbers(line: dict[str, Any]) -> bool:
    """Return whether no metric is text or infinite: the name of a split is the only text of a line."""
    return all(isinstance(value, str) if name == "split" else _is_metric(value) for name, value in line.items())


def _is_metric(value: Any) -> bool:
    return math.isfinite(value) if isinstance(value, float) else not isinstance(value, str)


def _sentence(file: Path, numbers: list[int]) -> str:
    first = ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
    return f"{file}: {len(numbers)} damaged lines ({first}) are set aside in {rejected(file).name}"
