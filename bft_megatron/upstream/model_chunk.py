"""A model chunk's state in a checkpoint, and the hooks of its modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bft_megatron.upstream.change import Change

SHARDED_STATE_DICT = Change(
    "megatron.core.models.gpt:GPTModel.sharded_state_dict",
    "replaced",
    "A LoRA run saves only its adapters. Megatron would also save the frozen weights, and would save an adapter in a "
    "parallel layer as if every rank held all of it. Set on one chunk, not on the class.",
    "`megatron.core` has adapters and saves only them",
    "tests/lora/test_gradients.py",
    ("self", "prefix", "sharded_offsets", "metadata"),
)
LOAD_STATE_DICT = Change(
    "megatron.core.models.gpt:GPTModel.load_state_dict",
    "replaced",
    "A LoRA run loads only its adapters, always strictly: Megatron repeats a failed load without `strict` and would "
    "resume with less than was saved. Set on one chunk, not on the class.",
    SHARDED_STATE_DICT.until,
    "tests/lora/test_runs.py",
    ("self", "state_dict", "strict", "assign"),
)
PRE_HOOKS = Change(
    "torch.nn:Module._forward_pre_hooks",
    "internal",
    "The head without logits uses the output layer's weight without calling the layer. With `overlap-param-gather` "
    "Megatron waits for a parameter only in the hook that runs before its module: without the hook the weight is that "
    "of the previous step.",
    "torch or Megatron runs a module's pre-hooks on request",
    "tests/layouts/test_heads.py",
)
HOOKS = Change(
    "torch.nn:Module._forward_hooks",
    "internal",
    "An output layer with forward hooks has to be called, so the head without logits is refused.",
    "torch reports whether a module has hooks",
    "tests/upstream/test_small_changes.py",
)


def save_and_load_instead(
    chunk: torch.nn.Module, save: Callable[..., dict[str, Any]], load: Callable[..., Any]
) -> None:
    """Have Megatron save and load a chunk with these functions.

    Args:
        save: called with (prefix, sharded_offsets, metadata), as Megatron calls `sharded_state_dict`.
        load: called with (state, strict), as Megatron calls `load_state_dict`.
    """
    SHARDED_STATE_DICT.put(save, on=chunk)
    LOAD_STATE_DICT.put(load, on=chunk)


def run_pre_hooks(module: torch.nn.Module) -> None:
    """Run the module's forward pre-hooks, as a call of it would; for hooks that ignore the arguments."""
    for hook in module._forward_pre_hooks.values():
        hook(module, ())


def has_hooks(module: torch.nn.Module) -> bool:
    """Return whether the module has forward hooks."""
    return bool(module._forward_hooks)
