"""The lines of metrics.jsonl: one JSON object for each step and each validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(file: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl in their order; none if there is no file."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if _whole(line)]


def drop_after(file: Path, step: int) -> None:
    """Drop the lines of steps after `step`: a resumed run repeats them, and they must not appear twice.

    Before the first step the file becomes empty, because the first validation is repeated too.
    """
    if not file.exists():
        return
    kept = [line for line in read(file) if line["iteration"] <= step] if step else []
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    temporary.replace(file)


def _whole(line: str) -> bool:
    """Return whether the line is complete: a process killed while writing may leave half of one."""
    try:
        return "iteration" in json.loads(line)
    except ValueError:
        return False
