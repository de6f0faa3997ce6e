"""Balanced Fine-Tuning on Megatron-Core: recipes, the vocab-parallel objective, and the training step that uses it."""

__version__ = "0.1.0"
"""Version of the package, which pyproject.toml reads from here."""
