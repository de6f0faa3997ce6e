"""Reports of a run: totals, metrics.jsonl, TensorBoard and the terminal."""
