"""The report of `bft-megatron doctor`."""

from __future__ import annotations

import textwrap

from rich.console import Console
from rich.markup import escape

from bft_megatron.installation import parts

COLOURS = {"good": "green", "missing": "yellow", "wrong": "red"}


def report(console: Console) -> bool:
    """Print every part, and return whether none of them is wrong."""
    found = parts.everything()
    for part in found:
        colour = COLOURS[part.state]
        console.print(f"{part.name:<24}[{colour}]{escape(part.found)}[/]", highlight=False, soft_wrap=True)
        for line in textwrap.wrap(part.says, 90):
            console.print(" " * 24 + escape(line), highlight=False, soft_wrap=True)
    wrong, missing = ([part.name for part in found if part.state == state] for state in ("wrong", "missing"))
    if missing:
        console.print(f"missing, and runs go on without: {', '.join(missing)}", highlight=False, soft_wrap=True)
    console.print(f"[red]wrong: {', '.join(wrong)}[/]" if wrong else "nothing is wrong")
    return not wrong
