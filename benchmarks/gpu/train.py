"""Whole training steps on one GPU by Megatron's own loop: tokens a second, share of the card's peak, memory.

    python -m benchmarks.gpu.train                        # all of MODELS, each in a process of its own
    python -m benchmarks.gpu.train llama8b-4-layers --losses "Megatron's loss" sft bft

Models have published sizes and weights drawn at random; rows are full of samples of random words. Several losses take
turns, step by step, on the same model. A step is timed between synchronisations; the median counts, the first two steps
of a loss do not. FLOPs are 6 a token and parameter (4 where the weights are frozen), without those of attention scores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""FLOP/s of a card's dense bf16 products, by the maker."""
HEADER = ["model", "loss", "ms a step", "tokens/s", "of the peak", "of a large product", "peak GiB"]


def _config(
    architecture: str, layers: int, hidden: int, heads: int, kv: int, ffn: int, v: int, tied: bool
) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": ffn,
        "vocab_size": v,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
    }


MODELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llama8b-4-layers": (_config("LlamaForCausalLM", 4, 4096, 32, 8, 14336, 128256, False), []),
    "smollm2-135m": (_config("LlamaForCausalLM", 30, 576, 9, 3, 1536, 49152, True), []),
    "qwen2.5-1.5b": (_config("Qwen2ForCausalLM", 28, 1536, 12, 2, 8960, 151936, True), []),
    "llama8b-lora": (_config("LlamaForCausalLM", 32, 4096, 32, 8, 14336, 128256, False), ["lora.rank=16"]),
}
"""Name -> the model's config.json, fields of the recipe."""


class Enough(Exception):
    """The last step is measured; a run would save next."""


def recipe(name: str, folder: Path, steps: int, overrides: list[str]) -> list[str]:
    """Write a model folder, data and a recipe for it -> the recipe's file and overrides."""
    config, fields = MODELS[name]
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "recipes" / "tiny" / file, model)
    words, rng = (ROOT / "recipes" / "tiny" / "train.jsonl").read_text().split(), random.Random(0)
    words = [word for word in words if word.isalpha()]

    def text(n: int) -> str:
        return " ".join(rng.choices(words, k=n))

    with (folder / "train.jsonl").open("w") as file:
        for _ in range(600):
            turns = [{"role": "user", "content": text(60)}, {"role": "assistant", "content": text(240)}]
            file.write(json.dumps({"messages": turns}) + "\n")
    lines = {
        "model": str(model),
        "init": "random",
        "output": str(folder / "run"),
        "data": {"train": str(folder / "train.jsonl"), "seq_length": 8192},
        "train": {"global_batch_size": 4, "iterations": steps, "lr": 1e-5},
    }
    (folder / "recipe.yaml").write_text(json.dumps(lines))
    return [str(folder / "recipe.yaml"), *fields, *overrides]


def measure(name: str, losses: list[str], rounds: int, overrides: list[str]) -> dict[str, Any]:
    """Train in this process, the losses taking turns -> milliseconds of each loss's steps, tokens, memory."""
    import torch
    import torch.distributed as dist
    from megatron.training import training

    from benchmarks import step as steps
    from benchmarks.gpu.head import product_speed
    from bft_megatron.hf.architectures import read_config
    from bft_megatron.processes.terminal import output_to
    from bft_megatron.recipe import reader
    from bft_megatron.run.folder import RunFolder
    from bft_megatron.run.prepared import prepare_rows
    from bft_megatron.run.resolved import Run
    from bft_megatron.training import loop

    times: dict[str, list[float]] = {loss: [] for loss in losses}
    turns: list[steps.TakingTurns] = []
    whole_step = training.train_step

    def timed(*args: Any, **kwargs: Any) -> Any:
        turns[0].turn = losses[sum(map(len, times.values())) % len(losses)]
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = whole_step(*args, **kwargs)
        torch.cuda.synchronize()
        times[turns[0].turn].append(1e3 * (time.perf_counter() - start))
        if sum(map(len, times.values())) == len(losses) * rounds:
            raise Enough
        return result

    def kept(*args: Any) -> steps.TakingTurns:
        turns.append(steps.TakingTurns(*args))
        return turns[0]

    training.train_step, loop.Step = timed, kept
    with tempfile.TemporaryDirectory() as folder:
        file, *fields = recipe(name, Path(folder), len(losses) * rounds, overrides)
        made = reader.load(file, fields)
        config = read_config(Path(made.model))
        rows = prepare_rows(made, Path(made.model), config.vocab_size)
        run = RunFolder.of(made)
        run.write_config(made, Path(made.model))
        with output_to(run.log(0)) as console, contextlib.suppress(Enough):
            loop.train(Run(made, config, Path(made.model), rows, 1), console)
        dist.destroy_process_group()
    return {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "ms": {loss: statistics.median(own[2:]) for loss, own in times.items()},
        "tokens": made.train.global_batch_size * made.data.seq_length,
        "GiB": torch.cuda.max_memory_allocated() / 2**30,
        "flops": flops(name, made.train.global_batch_size * made.data.seq_length),
        "peak": next((peak for card, peak in PEAKS.items() if card in torch.cuda.get_device_name()), None),
        "product": product_speed(),
    }


def flops(name: str, tokens: int) -> float:
    """Return the floating-point operations of a step's matrix products with weights."""
    config, fields = MODELS[name]
    h, ffn, v, layers = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers"))
    kv = config["num_key_value_heads"] * h // config["num_attention_heads"]
    parameters = layers * (2 * h * h + 2 * h * kv + 3 * h * ffn) + v * h
    per_parameter = 4 if any(field.startswith("lora") for field in fields) else 6
    return tokens * per_parameter * parameters


def table(everything: dict[str, Any]) -> str:
    """A markdown table, a row a model and loss; the peak is the maker's, the product is measured in the same run."""
    lines = [f"| {' | '.join(HEADER)} |", "|" + " --- |" * len(HEADER)]
    for name, found in everything.items():
        for loss, ms in found["ms"].items():
            speed = found["flops"] / ms * 1e3
            cells = [name, loss, f"{ms:,.0f}", f"{found['tokens'] / ms * 1e3:,.0f}"]
            cells += [f"{speed / limit:.0%}" if limit else "-" for limit in (found["peak"], found["product"])]
            cells.append(f"{found['GiB']:.1f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run each model in a process of its own and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--losses", nargs="+", default=["bft"], help="of benchmarks.step.LOSSES")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each loss")
    parser.add_argument("--set", nargs="*", default=[], help="fields of the recipe, key=value")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29612"}
        os.environ.update(alone)
        found = measure(options.models[0], options.losses, options.rounds, options.set)
        options.json.write_text(json.dumps(found))
        return
    everything, failed = {}, []
    for name in options.models:
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            words = ["--here", "--rounds", str(options.rounds), "--json", file.name, "--losses", *options.losses]
            command = [sys.executable, "-m", "benchmarks.gpu.train", name, *words, "--set", *options.set]
            if subprocess.run(command, cwd=ROOT, check=False, stdout=sys.stderr).returncode:
                failed.append(name)
                continue
            everything[name] = json.loads(Path(file.name).read_text())
    print(table(everything))
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
