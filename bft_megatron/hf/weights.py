"""The table of parameters: which Hugging Face tensors make up each of Megatron's parameters, and in which layout.

Loading, export and adapters all use it.
"""

from __future__ import annotations

import math
from functools import cache

from bft_megatron.hf.layer_weights import layer_weights
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.hf.tensors import HFTensor, Weight


def weights(config: ModelConfig) -> list[Weight]:
    """Return every parameter of the model, in the order of the layers; tied embeddings once."""
    h, v = config.hidden, config.vocab_size
    embedding = HFTensor(f"{config.prefix}embed_tokens.weight", (v, h))
    norm = HFTensor(f"{config.prefix}norm.weight", (h,))
    head = HFTensor("lm_head.weight", (v, h))
    return [
        Weight("embedding.word_embeddings.weight", None, (embedding,), 0, padded=True),
        *(w for layer in range(config.layers) for w in layer_weights(config, layer)),
        Weight("decoder.final_layernorm.weight", None, (norm,), None),
        *([] if config.tied else [Weight("output_layer.weight", None, (head,), 0, padded=True)]),
    ]


@cache  # the table of a mixture has ten thousands of tensors
def parameter_count(config: ModelConfig) -> int:
    """Return the number of parameters of the whole model, tied embeddings counted once and buffers not."""
    return sum(math.prod(t.shape) for w in weights(config) if not w.buffer for t in w.tensors)


def places(config: ModelConfig) -> dict[HFTensor, list[tuple[Weight, int]]]:
    """Return the tensors of the model's files, each with the weights that it is a part of and its number in each."""
    found: dict[HFTensor, list[tuple[Weight, int]]] = {}
    for weight in weights(config):
        for i, tensor in enumerate(weight.tensors):
            found.setdefault(tensor.whole, []).append((weight, i))
    return found
