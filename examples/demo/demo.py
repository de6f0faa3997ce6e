"""The demo: tunes a real model with BFT on real text in Megatron's training loop, on three tensor-parallel processes.

Each step prints its command, which also works by itself. At the end the demo prints held-out numbers and an answer,
before and after, and where the results are.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

HERE = Path(__file__).parent
RECIPE = "recipes/cpu_demo.yaml"
OUT = Path("runs/cpu_demo")
MODEL, RUN, EXPORT = OUT / "smollm2", OUT / "bft", OUT / "smollm2-bft"
QUESTION = "What is arachnodactyly?"
ANSWER_TOKENS = "80"

MEANINGS = {
    "mean_p": ("mean p", "probability given to the right token: what BFT raises, so watch this"),
    "accuracy": ("accuracy", "right token is the likeliest one"),
    "mean_confidence": ("lowest confidence", "of an answer's least certain stretch, mean over the answers"),
    "lm_loss": ("lm loss", "plain cross entropy; under BFT it may rise while mean p rises"),
}

console = Console()


def main() -> None:
    """Run all steps; exit at the first failure, with its status."""
    run(sys.executable, HERE / "smollm2.py", MODEL)
    run(sys.executable, HERE / "hpo_pairs.py", OUT / "data")
    before = ask(MODEL)
    run("bft-megatron", "train", RECIPE)
    if not EXPORT.exists():
        run("bft-megatron", "export", RUN, EXPORT)
    after = ask(EXPORT)
    show_numbers()
    for title, answer in (("before", before), ("after", after)):
        console.print(Panel(answer, title=f"{QUESTION} ({title})", title_align="left"))
    console.print(f"\nrun        {RUN}\ncurves     tensorboard --logdir {RUN / 'tensorboard'}\nmodel      {EXPORT}\n")
    console.print("Next:")
    console.print(f'  bft-megatron generate {EXPORT} "Which genes are linked to arachnodactyly?"', highlight=False)
    console.print(f"  bft-megatron train {RECIPE} objective.name=sft output={OUT / 'sft'}", highlight=False)


def run(*command: object) -> None:
    """Run a command and print it as one would type it."""
    words = [str(word) for word in command]
    console.print(f"[bold]$ {' '.join(['python' if w == sys.executable else w for w in words])}", highlight=False)
    status = subprocess.run(words, check=False).returncode
    if status:
        sys.exit(status)


def ask(model: Path) -> str:
    """Return the model's answer to the question."""
    command = ["bft-megatron", "generate", str(model), QUESTION, "--max-new-tokens", ANSWER_TOKENS]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout.strip()


def show_numbers() -> None:
    """Print the numbers of the held-out set before the first step and after the last."""
    lines = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    held_out = [line for line in lines if line.get("split") == "valid"]
    first, last = held_out[0], held_out[-1]
    held = f"{last['samples']} held-out answers of {last['tokens']:,} tokens"
    table = Table(title=f"{held}, before and after {last['iteration']} steps of BFT")
    for column, side in (("", "left"), ("before", "right"), ("after", "right"), ("", "left")):
        table.add_column(column, justify=side)
    for name, (title, meaning) in MEANINGS.items():
        table.add_row(title, f"{first[name]:.4f}", f"{last[name]:.4f}", meaning)
    console.print(table)


if __name__ == "__main__":
    main()
