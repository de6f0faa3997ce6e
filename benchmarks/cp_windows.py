"""Compares `cp_windows: per_rank` with `exact` on real text: the lowest confidence c and the weight 1 - c.

It needs a model folder and a JSONL of conversations; `make demo` leaves both:

    python benchmarks/cp_windows.py runs/cpu_demo/smollm2 runs/cpu_demo/data/valid.jsonl

Conversations are also joined into longer ones of several turns. log p comes from transformers; the windows are computed
from their definition, within the 2 CP chunks of a sample or over all of it. Takes some minutes on a CPU.
"""

from __future__ import annotations

import json
import math
import sys
from itertools import batched
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM

from bft_megatron.conversations import chat, tokenizers

TURNS = {1: 48, 4: 12, 16: 3}
"""Turns joined into one conversation -> number of such conversations."""
CONTEXT = (2, 4, 8)
GROUPS = (64, 256)


def main(model_folder: Path, data: Path) -> None:
    """Print the table as Markdown."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(model_folder, local_files_only=True)
    tokenizer = tokenizers.load(model_folder)
    messages = [json.loads(line)["messages"] for line in data.read_text().splitlines()]
    print("| turns | supervised tokens | CP | g | c exact | c per_rank | weight exact | weight per_rank | no window |")
    print("| --- " * 9 + "|")
    for turns, count in TURNS.items():
        joined = [[m for part in parts for m in part] for parts in batched(messages, turns)][:count]
        shown = track(joined, f"{turns} turns", console=Console(stderr=True))
        samples = [log_probs(model, *chat.encode(c, tokenizer, "assistant")) for c in shown]
        for cp in CONTEXT:
            for g in GROUPS:
                print(row(turns, samples, cp, g))


@torch.no_grad()
def log_probs(model: torch.nn.Module, tokens: list[int], supervised: list[bool]) -> np.ndarray:
    """Return log p [t] of a conversation's tokens after the first; NaN where the token is not supervised."""
    logits = model(torch.tensor([tokens])).logits[0, :-1]
    logp = logits.log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
    return np.where(supervised[1:], logp.double().numpy(), np.nan)


def lowest(logp: np.ndarray, chunks: int, g: int) -> tuple[float, bool]:
    """Return c with windows that stay within `chunks` equal chunks, and whether there was any window."""
    padded = np.pad(logp, (0, -len(logp) % chunks), constant_values=np.nan)
    means = []
    for chunk in np.split(padded, chunks):
        values = chunk[~np.isnan(chunk)]
        if len(values) >= g:
            means.append(np.lib.stride_tricks.sliding_window_view(values, g).mean(1).min())
    return math.exp(min(means) if means else np.nanmean(logp)), bool(means)


def row(turns: int, samples: list[np.ndarray], cp: int, g: int) -> str:
    """Return a row of the table: means over the samples."""
    exact = np.array([lowest(s, 1, g)[0] for s in samples])
    ranked = [lowest(s, 2 * cp, g) for s in samples]
    per_rank = np.array([c for c, _ in ranked])
    without = np.mean([not found for _, found in ranked])
    tokens = np.mean([np.count_nonzero(~np.isnan(s)) for s in samples])
    numbers = (exact.mean(), per_rank.mean(), 1 - exact.mean(), 1 - per_rank.mean())
    return (
        f"| {turns} | {tokens:,.0f} | {cp} | {g} | " + " | ".join(f"{x:.3f}" for x in numbers) + f" | {without:.0%} |"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
