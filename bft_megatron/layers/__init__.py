"""Transformer layers in plain torch, for Megatron's layer spec."""
