"""The label that marks a position without supervision, for the data, the objective and the Hugging Face trainer."""

IGNORE_INDEX = -100
"""The value that transformers and torch's cross entropy use."""
