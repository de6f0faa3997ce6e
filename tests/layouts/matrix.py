"""Every objective on every layout, as a table: `make matrix`, or a sample of it with `make matrix N=200 SEED=1`.

What `test_layouts` does for some is done here for all that eight processes can hold; of a sample a third each are dense
models, mixtures of experts and hybrids. All take days on two cores; an interrupt ends it with the table so
far.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

import tests.conftest  # noqa: F401  torch and Megatron, once, before any fork
from tests.helpers import model_reference as reference
from tests.helpers.cases import SEED, every_kind_of_cases
from tests.helpers.comparing import TOLERANCE, differences
from tests.helpers.runs import Case, Layout, Result, make_recipe, run, write_data

console = Console()


def main(count: int | None) -> int:
    """Run all cases, or `count` of them, and print a line a layout; 1 if a difference is above the tolerance."""
    kinds, rng = every_kind_of_cases(), random.Random(SEED)
    total = sum(map(len, kinds))
    each = total if count is None else count // len(kinds)
    chosen = [pair for pool in kinds for pair in rng.sample(pool, min(each, len(pool)))]
    worst: dict[str, list[tuple[float, str]]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        matrix = Matrix(Path(folder))
        for case, layout in track(chosen, f"{len(chosen)} of {total} cases, SEED={SEED}", console=console):
            worst.setdefault(str(layout), []).append(matrix.worst(case, layout))
    console.print(table(worst))
    return int(any(difference > TOLERANCE for found in worst.values() for difference, _ in found))


class Matrix:
    """Runs cases in a folder; the plain references are made once each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_data(folder)
        self.plain = lru_cache(self._plain)

    def worst(self, case: Case, layout: Layout) -> tuple[float, str]:
        """The largest relative difference to plain float64 and where it is, +inf where the run fails."""
        name = f"{case} {layout}"
        try:
            with tempfile.TemporaryDirectory(dir=self.folder) as out:
                result = run(make_recipe(Path(out) / "run", self.folder, case, layout, 1), layout.world, before=_quiet)
        except AssertionError as e:
            console.print(f"{name} failed:\n{e}", markup=False)
            return float("inf"), f"{case}: failed"
        found = differences(result, self.plain(case, layout.context if case.cp_windows == "per_rank" else 1))
        where = max(found, key=found.__getitem__)
        return found[where], f"{case}: {where}"

    def _plain(self, case: Case, windows_cp: int) -> Result:
        return reference.first_step(make_recipe(self.folder / "plain", self.folder, case, Layout(), 1), windows_cp)


def _quiet() -> None:
    """In a run's processes: what they say of their steps is not for this table."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def table(worst: dict[str, list[tuple[float, str]]]) -> Table:
    """A line a layout."""
    shown = Table("layout", "cases", "largest difference", "where", title="loss, reports and gradients against float64")
    for layout, found in sorted(worst.items()):
        difference, where = max(found)
        colour = "red" if difference > TOLERANCE else "green"
        shown.add_row(layout, str(len(found)), f"[{colour}]{difference:.1e}", where)
    return shown


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else None))
