"""All measurements on one GPU, in parts that take up where they stopped: `make bench-gpu`.

    python -m benchmarks.gpu                 # parts that are not measured on this card with these versions
    python -m benchmarks.gpu --only 8192x    # parts whose name holds this
    python -m benchmarks.gpu --page          # the tables of what is measured

Each part is a process of at most eight minutes. Numbers are in runs/bench-gpu.json, the tables in the .md beside it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu import blocks, head, train
from benchmarks.gpu.parts import ROOT, Part, Results, machine, measure

HEAD, TRAIN = ["-m", "benchmarks.gpu.head"], ["-m", "benchmarks.gpu.train"]
BOTH = ["--losses", "Megatron's loss", "bft"]
PARTS = [
    *(Part(f"head {case}", [*HEAD, case]) for case in head.CASES),
    Part("blocks of the Triton kernels", ["-m", "benchmarks.gpu.blocks"]),
    *(Part(f"step {model}", [*TRAIN, model, *BOTH]) for model in train.MODELS),
]
"""The head's cases first: they are what the package's own code can change."""
RESULTS = ROOT / "runs" / "bench-gpu.json"


def page(results: Results, failed: dict[str, str]) -> str:
    """Return the tables of all parts in their order, and which parts are missing and why."""
    card = ", ".join(f"{name} {value}" if name != "card" else value for name, value in results.machine.items())
    lines = [f"On one {card}:"]
    steps, missing = {}, []
    for part in PARTS:
        found = results.of(part)
        if found is None:
            missing.append(f"- {part.name}: {failed.get(part.name, 'not measured')}")
        elif part.words[:2] == HEAD:
            lines += ["", head.speeds(found["limits"]), "", head.tables(found)]
        elif part.words[:2] == TRAIN:
            steps |= found
        else:
            lines += ["", blocks.table(found)]
    lines += ["", train.table(steps)] if steps else []
    return "\n".join([*lines, "", *missing]).rstrip() + "\n"


def main() -> int:
    """Measure what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="of the parts' names")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    try:
        here = machine()
    except (OSError, subprocess.CalledProcessError) as e:
        print(f"nothing is measured: nvidia-smi shows no GPU ({e})", file=sys.stderr)
        return 1
    results = Results(options.results, here)
    chosen = [] if options.page else [part for part in PARTS if options.only in part.name]
    failed = measure(chosen, results)
    written = page(results, failed)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.with_suffix(".md").write_text(written)
    print(written)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
