"""Writing a conversion: the recipe's YAML, and the table that compares both sides."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bft_megatron.llamafactory.conversion import GROUPS, Conversion, Lost

_ORDER = ("model", "init", "device", "lora", "objective", "data", "parallel", "train", "megatron", "output")
_FIELDS = [f"{group}.{f.name}" for group, settings in GROUPS.items() for f in fields(settings)]


def recipe_text(conversion: Conversion) -> str:
    """Return the recipe's YAML, with a comment at the top that lists what was not carried over."""
    head = [f"# From {conversion.config.path.name}, for {_gpus(conversion.gpus)}."]
    if conversion.lost:
        head += ["# Not carried over:", *(f"#   {_line(lost)}" for lost in conversion.lost)]
    if conversion.differing:
        head += ["# Done otherwise here:", *(f"#   {name}: {how}" for name, how in conversion.differing.items())]
    tree = _nested(conversion.fields)
    ordered = {name: tree[name] for name in _ORDER if name in tree}
    return "\n".join([*head, yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, width=120)])


def print_table(conversion: Conversion, console: Console) -> None:
    """Print effective values side by side, then the fields that were not carried over and those that need not be."""
    more = " (--gpus N for more)" if conversion.assumed else ""
    table, before = Table("", f"LLaMA-Factory on {_gpus(conversion.gpus)}{more}", "recipe"), ""
    for row in conversion.rows:
        table.add_row(*map(escape, (row.matter if row.matter != before else "", row.theirs, row.ours)))
        before = row.matter
    console.print(table)
    if conversion.lost:
        console.print("\n[bold]Not carried over:[/]")
        for lost in conversion.lost:
            console.print(
                f"[yellow]{escape(lost.where)}[/] {escape(f'{_shown(lost.value)}: {lost.why}')}", soft_wrap=True
            )
    if conversion.differing:
        console.print("\n[bold]Done otherwise here:[/]")
        for name, how in conversion.differing.items():
            console.print(f"[yellow]{escape(name)}[/] {escape(how)}", soft_wrap=True, highlight=False)
    if conversion.not_needed:
        console.print("\n[bold]Need no counterpart:[/]")
        for reason, names in conversion.not_needed.items():
            console.print(f"{escape(', '.join(names))}: {escape(reason)}", soft_wrap=True, highlight=False)


def _line(lost: Lost) -> str:
    line = lost.where.partition(": ")[0].rpartition(":")[2]
    return f"line {line}, {lost.name}: {_shown(lost.value)} ({lost.why})".replace("\n", " ")


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """Group fields with dotted names into a tree, each group in the recipe's own order."""
    tree: dict[str, Any] = {}
    for name in sorted(values, key=lambda name: _FIELDS.index(name) if name in _FIELDS else -1):
        group, _, leaf = name.rpartition(".")
        (tree.setdefault(group, {}) if group else tree)[leaf] = values[name]
    return tree


def _gpus(number: int) -> str:
    return f"{number} GPU{'s' * (number > 1)}"


def _shown(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
