"""Bytes that a parameter takes in a checkpoint, in training in bf16 with Adam."""

WEIGHT_BYTES = 2
"""bf16."""
OPTIMIZER_BYTES = 12
"""The fp32 copy of the weight and two moments; what the distributed optimizer shards over data parallelism."""
CHECKPOINT_BYTES = WEIGHT_BYTES + OPTIMIZER_BYTES
