"""What a run reports: totals, metrics.jsonl, the terminal."""
