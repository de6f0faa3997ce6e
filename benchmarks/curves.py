"""Draws the held-out mean p and cross entropy of runs side by side, from their metrics.jsonl.

python -m benchmarks.curves runs/cpu_demo/bft runs/cpu_demo/sft --plot docs/images/curves.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

PANELS = {"mean_p": "mean p of the right token", "lm_loss": "cross entropy (lm_loss)"}


def validations(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's validations over the whole held-out set, in order."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line.get("split") == "valid"]


def draw(runs: list[Path], plot: Path) -> None:
    """Write a PNG or SVG with one panel per metric and one line per run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(9, 3.2), layout="constrained")
    for (metric, title), panel in zip(PANELS.items(), axes, strict=True):
        for run in runs:
            lines = validations(run)
            panel.plot([x["iteration"] for x in lines], [x[metric] for x in lines], marker="o", label=run.name)
        panel.set_title(title, fontsize=11)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    figure.savefig(plot, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--plot", type=Path, required=True, help="file to draw")
    arguments = parser.parse_args()
    draw(arguments.runs, arguments.plot)
