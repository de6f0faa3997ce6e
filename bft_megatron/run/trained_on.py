"""The record of the training rows of a run: written when it first starts and compared when it goes on.

The recipe only names files, and their content may have changed since. Validation rows may change when a run resumes, so
they are not recorded.
"""

from __future__ import annotations

import json
from typing import Any

from bft_megatron.data.blend import Blend
from bft_megatron.errors import FieldError, Unreadable
from bft_megatron.run import atomic
from bft_megatron.run.folder import RunFolder

SHOWN = 12
"""Digits of a content hash in a message."""

_Rows = dict[str, Any]  # name, rows and content of a source


class _NoRecord(Exception):
    """Why there is nothing to compare with."""


def check(folder: RunFolder, train: Blend) -> None:
    """Check that a run which goes on learns from the rows that it began with; a folder without a record passes.

    Raises:
        FieldError: the folder holds checkpoints of a run on other training rows.
        Unreadable: the file system does not let the record be read.
    """
    if not folder.has_checkpoints():
        return
    try:
        recorded = _read(folder, train)
    except _NoRecord:
        return
    for was, found in zip(recorded, _rows(train), strict=True):
        if was["content"] != found["content"]:
            raise FieldError(
                "data.train",
                f"{folder.root} holds checkpoints of a run on other rows of {found['name']}: {_shown(was)}, not "
                f"{_shown(found)}. Its files, the tokenizer or the template have changed: put them back to go on with "
                "that run, or choose another output folder",
            )


def record(folder: RunFolder, train: Blend) -> None:
    """Record what the run learns from, atomically (rank 0). A run that goes on keeps its record.

    Prints a line where a run goes on and has no record that tells what it began with.
    """
    if folder.has_checkpoints():
        try:
            _read(folder, train)
            return
        except _NoRecord as e:
            print(
                f"{folder.trained_on} {e}: nothing tells whether the training rows are those that the run began with; "
                "from here on it is compared with these",
                flush=True,
            )
    atomic.write(folder.trained_on, json.dumps({"train": _rows(train)}, indent=2))


def _read(folder: RunFolder, train: Blend) -> list[_Rows]:
    try:
        recorded = json.loads(folder.trained_on.read_bytes())["train"]
        whole = all(isinstance(s["rows"], int) and isinstance(s["content"], str) for s in recorded)
        names = [s["name"] for s in recorded]
    except FileNotFoundError:
        raise _NoRecord("is missing") from None
    except OSError as e:
        raise Unreadable.of(folder.trained_on, e) from None
    except (KeyError, RecursionError, TypeError, ValueError):
        raise _NoRecord("is damaged") from None
    if not whole:
        raise _NoRecord("is damaged")
    if names != list(train.names):
        raise _NoRecord("names other sources")
    return list(recorded)


def _rows(train: Blend) -> list[_Rows]:
    return [{"name": part.name, "rows": part.prepared.rows, "content": part.prepared.content} for part in train.parts]


def _shown(source: _Rows) -> str:
    return f"{source['rows']:,} rows of hash {source['content'][:SHOWN]}"
