"""A model chunk's own part in a checkpoint, and the hooks of its modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bft_megatron.upstream.change import Change

SHARDED_STATE_DICT = Change(
    "megatron.core.models.gpt:GPTModel.sharded_state_dict",
    "replaced",
    "A LoRA run saves its adapters alone; Megatron would save the frozen weights too, and an adapter in a parallel "
    "layer as if it were whole on every rank. Of the one chunk, not of the class.",
    "`megatron.core` has adapters and saves them alone",
    "tests/lora/test_gradients.py",
    ("self", "prefix", "sharded_offsets", "metadata"),
)
LOAD_STATE_DICT = Change(
    "megatron.core.models.gpt:GPTModel.load_state_dict",
    "replaced",
    "A LoRA run loads its adapters alone, always strictly: Megatron tries a load that failed again without `strict`, "
    "and would resume with less than was saved. Of the one chunk, not of the class.",
    SHARDED_STATE_DICT.until,
    "tests/lora/test_runs.py",
    ("self", "state_dict", "strict", "assign"),
)
PRE_HOOKS = Change(
    "torch.nn:Module._forward_pre_hooks",
    "internal",
    "The head without logits uses the output layer's weight without calling the layer. With `overlap-param-gather` "
    "Megatron waits for a parameter in the hook that runs before its module, and nowhere else: unless it runs, the "
    "weight is that of the step before.",
    "torch or Megatron runs a module's pre-hooks on request",
    "tests/layouts/test_heads.py",
)
HOOKS = Change(
    "torch.nn:Module._forward_hooks",
    "internal",
    "An output layer that others listen to has to be called, so the head without logits is refused.",
    "torch says whether a module has hooks",
    "tests/upstream/test_small_changes.py",
)


def save_and_load_instead(
    chunk: torch.nn.Module, save: Callable[..., dict[str, Any]], load: Callable[..., Any]
) -> None:
    """Have Megatron save and load a chunk by these.

    Args:
        save: called with (prefix, sharded_offsets, metadata), as Megatron calls `sharded_state_dict`.
        load: called with (state, strict), as it calls `load_state_dict`.
    """
    SHARDED_STATE_DICT.put(save, on=chunk)
    LOAD_STATE_DICT.put(load, on=chunk)


def run_pre_hooks(module: torch.nn.Module) -> None:
    """What calling the module would do before its `forward`, for hooks that do not look at its arguments."""
    for hook in module._forward_pre_hooks.values():
        hook(module, ())


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether calling the module would call others too, after its `forward`."""
    return bool(module._forward_hooks)
