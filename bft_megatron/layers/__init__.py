"""Transformer layers of plain torch, for Megatron's layer spec."""
