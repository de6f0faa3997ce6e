"""Compares preparing data with the tokenizer alone: tokens per second, peak memory, and how full the rows are.

    python benchmarks/prepare.py MODEL [--conversations 100000] [--seq-length 4096]

MODEL is a Hugging Face folder with a tokenizer and a chat template; `make demo` leaves runs/cpu_demo/smollm2. The
conversations are passages of Python's own documentation, about 500 tokens each. The tokenizer alone is one call of
`tokenizer(texts)` per thousand rendered conversations, with all its threads; it runs before and after preparing. CPU
time is that of all threads and processes, which says more than wall time on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import batched
from pathlib import Path
from pydoc_data.topics import topics


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--conversations", type=int, default=100_000)
    parser.add_argument("--seq-length", type=int, default=4096)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "conversations.jsonl"
        write_conversations(source, options.conversations)
        before = apart(bare, source, options.model)
        prepared = apart(whole, source, options.model, options.seq_length, folder)
        after = apart(bare, source, options.model)
    alone = {name: before[name] + after[name] for name in before}
    rows = {"`tokenizer(texts)`": alone, "`bft-megatron prepare`": prepared}
    speeds = {what: [row["tokens"] / row[clock] for clock in ("seconds", "cpu_seconds")] for what, row in rows.items()}
    print(
        f"{options.conversations:,} conversations, {prepared['tokens']:,} tokens, {len(os.sched_getaffinity(0))} cores"
    )
    print("| | tokens a second | tokens a CPU second |")
    print("| --- | --- | --- |")
    for what, found in speeds.items():
        shares = [speed / base for speed, base in zip(found, speeds["`tokenizer(texts)`"], strict=True)]
        print(
            f"| {what} | "
            + " | ".join(f"{x:,.0f} ({share:.0%})" for x, share in zip(found, shares, strict=True))
            + " |"
        )
    print(f"peak memory of all processes {prepared['mib']:,.0f} MiB; rows {prepared['efficiency']:.2%} full")


def write_conversations(path: Path, count: int) -> None:
    """Write passages of 80 to 500 words, the first third of each as the question, the rest as the answer."""
    words = " ".join(topics.values()).split()
    rng = random.Random(1)
    with path.open("w") as file:
        for _ in range(count):
            start, size = rng.randrange(len(words) - 500), rng.randrange(80, 500)
            passage = words[start : start + size]
            question, answer = " ".join(passage[: size // 3]), " ".join(passage[size // 3 :])
            roles = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": roles}) + "\n")


def apart(function: Callable[..., dict[str, float]], *arguments: object) -> dict[str, float]:
    """Return the result of a function run in its own process, so that each has its own peak of memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def bare(source: Path, model: str) -> dict[str, float]:
    """Measure the tokenizer's own call on rendered conversations; only the call is timed."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    tokens, seconds, cpu_seconds = 0, 0.0, 0.0
    with source.open() as lines:
        for batch in batched(lines, 1000):
            texts = [tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False) for line in batch]
            start, cpu_start = time.perf_counter(), time.process_time()
            encoded = tokenizer(texts)
            seconds += time.perf_counter() - start
            cpu_seconds += time.process_time() - cpu_start
            tokens += sum(map(len, encoded["input_ids"]))
    return {"tokens": tokens, "seconds": seconds, "cpu_seconds": cpu_seconds}


def whole(source: Path, model: str, seq_length: int, folder: str) -> dict[str, float]:
    """Measure `prepare`, from the file to the packed rows on disk."""
    from bft_megatron.data.prepare import prepare
    from bft_megatron.recipe.schema import DataSettings

    start = time.perf_counter()
    prepared = prepare(source, model, DataSettings(str(source), seq_length=seq_length), 1, folder)
    seconds = time.perf_counter() - start
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    peak = [usage.ru_maxrss / 1024 for usage in used]
    return {
        "tokens": prepared.counts.tokens,
        "seconds": seconds,
        "cpu_seconds": sum(usage.ru_utime + usage.ru_stime for usage in used),
        "mib": peak[0] + len(os.sched_getaffinity(0)) * peak[1],  # counts shared memory more than once
        "efficiency": prepared.efficiency,
    }


if __name__ == "__main__":
    main()
