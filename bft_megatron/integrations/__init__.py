"""The objective inside other trainers: their batches in, their loss and reports out, the numbers of our own step."""
