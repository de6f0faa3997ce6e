"""The label of a token without supervision, the same in the data, the objective and the Hugging Face functions."""

IGNORE_INDEX = -100
"""As in transformers."""
