"""Bytes per parameter in a checkpoint of a run in bf16 with Adam."""

WEIGHT_BYTES = 2
"""The bf16 weight."""
OPTIMIZER_BYTES = 12
"""The fp32 master weight and two fp32 moments, which the distributed optimizer shards over data parallelism."""
CHECKPOINT_BYTES = WEIGHT_BYTES + OPTIMIZER_BYTES
"""The weight and its optimizer state."""
