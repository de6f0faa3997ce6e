"""Balanced Fine-Tuning on Megatron-Core: recipes, the vocab-parallel objective, and its place in Megatron's training
step.
"""

__version__ = "0.1.0"
"""Of this package, said here alone: pyproject.toml reads it."""
