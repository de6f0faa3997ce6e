"""A table of the prepared sources: rows, samples dropped and why, tokens, lengths."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bft_megatron.data.counts import Counts
from bft_megatron.data.prepare import Prepared

BARS = " ▁▂▃▄▅▆▇█"
SHOWN = 5
"""Number of refused rows shown; all of them are in refused.txt beside the samples."""


def summary_table(sources: Mapping[str, Prepared]) -> RenderableType:
    """Return a table with one column per source, followed by the first refused rows and the notes.

    Args:
        sources: prepared sources by their names in reports.
    """
    table = Table()
    table.add_column("")
    for name in sources:
        table.add_column(Text(name), justify="right")
    columns = [_numbers(prepared) for prepared in sources.values()]
    for what in columns[0]:
        if what not in OPTIONAL or any(column[what] != "0" for column in columns):
            table.add_row(what, *(column[what] for column in columns))
    lines = [line for name, prepared in sources.items() for line in (*_refused(prepared), *_notes(name, prepared))]
    return Group(table, *map(Text, lines))


OPTIONAL = {"rows refused", "too long, dropped", "too long, truncated", "nothing to learn, dropped"}
"""Lines that are shown only if some source has a non-zero number there."""


def _numbers(prepared: Prepared) -> dict[str, str]:
    counts = prepared.counts
    dropped, truncated = (counts.overlong, 0) if prepared.overlong == "drop" else (0, counts.overlong)
    return {
        "conversations": f"{counts.conversations:,}",
        "rows refused": f"{counts.refused:,}",
        "too long, dropped": f"{dropped:,}",
        "too long, truncated": f"{truncated:,}",
        "nothing to learn, dropped": f"{counts.unsupervised:,}",
        "samples": f"{counts.samples:,}",
        "tokens": f"{counts.tokens:,}",
        "supervised": f"{counts.supervised / counts.tokens:.1%}",
        f"rows of {prepared.seq_length:,}": f"{counts.rows:,}",
        "full": f"{prepared.efficiency:.1%}",
        "lengths": histogram(counts),
    }


def histogram(counts: Counts) -> str:
    """Return the samples' lengths as bars; each bar covers twice the lengths of the one before: `16 ▁▃█▂ 128`."""
    filled = [k for k, n in enumerate(counts.lengths) if n]
    first, last = filled[0], filled[-1]
    bins = counts.lengths[first : last + 1]
    bars = "".join(BARS[-(-n * (len(BARS) - 1) // max(bins))] for n in bins)
    return f"{2**first:,} {bars} {2**last:,}"


def _refused(prepared: Prepared) -> list[str]:
    if not prepared.counts.refused:
        return []
    path = prepared.folder / "refused.txt"
    lines = path.read_text(encoding="utf-8").splitlines()
    more = [f"... and {len(lines) - SHOWN:,} more, in {path}"] if len(lines) > SHOWN else []
    return [*(f"refused: {line}" for line in lines[:SHOWN]), *more]


def _notes(name: str, prepared: Prepared) -> list[str]:
    return [f"{name}, {number:,} samples: {note}" for note, number in prepared.counts.notes.items()]
