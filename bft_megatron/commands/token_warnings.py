"""Warnings about tokens before training: turns that end where the model does not stop, ids without an embedding.

The counts are those of `data.ends`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bft_megatron.hf import stops
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.prepared import RunRows


def of(rows: RunRows, recipe: Recipe, folder: Path, vocab_size: int) -> Iterator[str]:
    """Yield a line for each thing that the user should know before training.

    Args:
        folder: the model's, with its tokenizer.
        vocab_size: rows of the model's embedding.
    """
    own = stops.stop_tokens(folder)
    for part in rows.train.parts:
        turns, ended = part.prepared.counts.turns, sum(part.prepared.counts.ends.values())
        if ended < turns:
            yield (
                f"{turns - ended:,} of the {turns:,} learned turns of {part.name} end in no control token: the model "
                "does not learn to stop after them. The chat template writes no end of turn there, or leaves it "
                "outside {% generation %}"
            )
        others = sorted(set(map(int, part.prepared.counts.ends)) - rows.stops - set(own))
        if others:
            yield (
                f"learned turns of {part.name} end in {stops.named(folder, others)} too, which is no stop token of the "
                "exports: it is rare, or inside other turns"
            )
    if new := sorted(rows.stops - set(own)):
        served = f"; where the base serves the adapters, requests need stop_token_ids {new}" if recipe.lora else ""
        yield (
            f"learned turns end in {stops.named(folder, new)}, where {recipe.model} itself does not stop (its "
            f"eos_token_id: {stops.named(folder, own) or 'none'}): {stops.FILE} of the exports will have both{served}"
        )
    if rows.tokenizer_size > vocab_size:
        yield (
            f"the tokenizer of {recipe.model} has {rows.tokenizer_size:,} tokens, its embedding {vocab_size:,} rows: "
            "no row here holds one of the others, but a prompt that does would fail"
        )
