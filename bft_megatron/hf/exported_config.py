"""The config.json of an export: that of the model, with the dtype of the weights written."""

from __future__ import annotations

from typing import Any

from bft_megatron.hf.architectures import ARCHITECTURES, TEXT_PART
from bft_megatron.hf.model_config import ModelConfig

_DTYPE = ("dtype", "torch_dtype")
"""Its keys: of transformers 5, and of 4."""


def changed(raw: dict[str, Any], config: ModelConfig, dtype: str, *, prediction: bool) -> dict[str, Any]:
    """Return the values of a config.json as an export has them.

    Args:
        dtype: of the weights, such as `bfloat16`; also of the text part, where config.json has it there.
        prediction: whether layers for multi-token prediction are exported; if not, none are announced.
    """
    architecture = ARCHITECTURES[config.architecture]
    none = {} if prediction or not config.prediction_layers else {architecture.prediction_key: 0}
    if not architecture.text_part:
        return (_with_dtype(raw, dtype) or raw | {"dtype": dtype}) | none
    text = raw[TEXT_PART]
    with_text = raw | {TEXT_PART: (_with_dtype(text, dtype) or text) | none}
    if not _with_dtype(raw, dtype) and _with_dtype(text, dtype):
        return with_text
    return _with_dtype(with_text, dtype) or with_text | {"dtype": dtype}


def _with_dtype(values: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return values with the dtype changed where they have one; nothing where they have none."""
    keys = [key for key in _DTYPE if key in values]
    return values | dict.fromkeys(keys, dtype) if keys else {}
