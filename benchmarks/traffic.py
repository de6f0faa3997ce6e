"""Compares the objective's communication with the model's, by formulas: the table of docs/costs.md.

    python -m benchmarks.traffic

tests/training/test_communication.py checks `objective` against the collectives of real processes. The model's share is
counted by hand, for `recipes/llama31_70b.yaml` on 64 GPUs and the same layout with more data parallelism: Megatron's
collectives under sequence parallelism, fp32 gradients, weights gathered in bf16, keys and values passed around the
context-parallel ring. Bytes are those that a GPU of the last stage sends if every collective is a ring.
"""

from __future__ import annotations

from tests.helpers.traffic import objective

TENSOR, PIPELINE, CHUNKS, CONTEXT = 4, 4, 5, 2
LAYERS, HIDDEN, KV_WIDTH, PARAMETERS = 80, 8192, 1024, 70.6e9
TOKENS, SAMPLES, MICRO_BATCHES = 8192, 16, 16
"""Tokens of a row, supervised samples in it, rows that a rank processes in a step."""


def _all_reduce(given: float, ranks: int) -> float:
    return 2 * given * (ranks - 1) / ranks


def _gather(whole: float, ranks: int) -> float:
    """Return the bytes that a rank sends in an all-gather or reduce-scatter of `whole` bytes in total."""
    return whole * (ranks - 1) / ranks


def model(data: int) -> dict[str, float]:
    """Return the bytes that a rank sends in a step for the model itself, by group."""
    hidden = TOKENS // CONTEXT * HIDDEN * 2  # bf16, whole sequence of a context-parallel rank
    stage_layers = LAYERS // PIPELINE
    # Per layer: two gathers and two reduce-scatters forward, the same backward, and two gathers for the weights' grads.
    tensor = 10 * stage_layers * _gather(hidden, TENSOR) + 3 * _gather(hidden, TENSOR)  # and the output layer's three
    keys_values = TOKENS // CONTEXT * KV_WIDTH // TENSOR * 2 * 2
    context = 3 * stage_layers * (CONTEXT - 1) * keys_values  # once forward; twice backward, with their gradients
    pipeline = 2 * CHUNKS * hidden / TENSOR
    shard = PARAMETERS / TENSOR / PIPELINE
    return {
        "tensor": MICRO_BATCHES * tensor,
        "context": MICRO_BATCHES * context,
        "pipeline": MICRO_BATCHES * pipeline,
        "data": _gather(4 * shard, data * CONTEXT) + _gather(2 * shard, data * CONTEXT),
    }


def main() -> None:
    """Print a Markdown table with a row per number of GPUs."""
    print("| GPUs | data parallel | model: TP | CP | PP | DP | objective: TP | CP | DP x CP | share |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for gpus in (64, 512, 4096):
        data = gpus // (TENSOR * PIPELINE * CONTEXT)
        held = TOKENS // CONTEXT  # all of them supervised, at most
        ours, theirs = objective(held, SAMPLES + 1, CONTEXT, gathered=held), model(data)
        sent = (
            MICRO_BATCHES * _all_reduce(ours["tensor"], TENSOR),
            MICRO_BATCHES * _all_reduce(ours["context"], CONTEXT),  # of two ranks, which also send as much to gather
            _all_reduce(ours["step"], data * CONTEXT),
        )
        share = sum(sent) / sum(theirs.values())
        cells = [f"{theirs[name] / 1e9:,.1f} GB" for name in ("tensor", "context", "pipeline", "data")]
        print(
            f"| {gpus:,} | {data} | {' | '.join(cells)} | {sent[0] / 1e6:.1f} MB | {sent[1] / 1e3:.1f} kB | "
            f"{sent[2]:.0f} B | {share:.1e} |"
        )


if __name__ == "__main__":
    main()
