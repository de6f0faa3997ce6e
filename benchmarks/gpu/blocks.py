"""Times the Triton kernels with blocks of other sizes and other numbers of warps, for `triton_tiles.LAUNCHES`.

    python -m benchmarks.gpu.blocks                 # vocabularies of common models, and parts of them under TP
    python -m benchmarks.gpu.blocks 128256 --json blocks.json

Milliseconds are the median of 20 of both kernels over 4,096 rows of bf16; the limit is three passes at the speed of a
copy.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.head import copy_speed, median
from bft_megatron.objective import triton_tiles
from bft_megatron.objective.sums import shard_labels

COLUMNS = [16_032, 32_000, 49_152, 128_256, 152_064]
BLOCKS, WARPS = (1024, 2048, 4096, 8192), (4, 8, 16)
ROWS = 4096


def measure(columns: int) -> dict[str, float]:
    """Return milliseconds of both kernels by `block x warps`."""
    rows = torch.randn(ROWS, columns, device="cuda").bfloat16()
    label = shard_labels(torch.randint(columns, (ROWS,), device="cuda"), columns, None, None)
    a_row = torch.ones(ROWS, device="cuda")
    shift = triton_tiles.sums(rows, label).shift.float()
    rows_out, found = torch.empty_like(rows), {}

    def both() -> None:
        triton_tiles.sums(rows, label)
        triton_tiles.gradient(rows, rows_out, label, shift, a_row, a_row)

    usual = dict(triton_tiles.LAUNCHES)
    for block, warps in product(BLOCKS, WARPS):
        triton_tiles.LAUNCHES[1] = (block, warps)
        found[f"{block} x {warps}"] = median(both)
    triton_tiles.LAUNCHES.update(usual)
    return found


def table(everything: dict[str, Any]) -> str:
    """A markdown table, a row a number of columns: the launch in use, the fastest, and their shares of the limit."""
    lines = ["| columns | in use | ms | of the limit | fastest | ms |", "| --- | --- | --- | --- | --- | --- |"]
    for columns, found in everything["columns"].items():
        used, best = everything["in use"], min(found, key=lambda launch: found[launch])
        limit = 1e3 * 3 * 2 * ROWS * int(columns) / everything["copy"]
        shown = f"{found[used]:.2f} | {limit / found[used]:.0%} | {best} | {found[best]:.2f}"
        lines.append(f"| {int(columns):,} | {used} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, and write all numbers as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("columns", nargs="*", type=int, default=COLUMNS)
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    ((block, warps),) = triton_tiles.LAUNCHES.values()
    everything: dict[str, Any] = {"copy": copy_speed(), "in use": f"{block} x {warps}"}
    everything["columns"] = {str(columns): measure(columns) for columns in options.columns}
    print(table(everything))
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
