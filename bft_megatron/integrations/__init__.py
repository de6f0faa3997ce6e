"""The objective inside other trainers: their batches in, their reports out, the numbers of our own step."""
