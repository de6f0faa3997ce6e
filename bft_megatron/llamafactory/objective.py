"""The objective, with the settings of Balanced Fine-Tuning from the environment."""

from __future__ import annotations

import os

from bft_megatron.llamafactory.config import Config
from bft_megatron.llamafactory.conversion import Conversion
from bft_megatron.llamafactory.parallelism import on_megatron
from bft_megatron.recipe import environment


def summed(config: Config) -> int:
    """Return how many times the gradient of LLaMA-Factory's trainer is ours, when it is clipped and given to Adam.

    The loss of BFT is a mean over the samples of a micro-batch, and the trainer adds a step's micro-batches up. The
    other losses are divided by the step's tokens, as here.
    """
    is_bft = config.flag("use_bft_loss") and not on_megatron(config)
    return config.integer("gradient_accumulation_steps", 1) if is_bft else 1


def carry(to: Conversion) -> None:
    """Convert `use_bft_loss` and `use_dft_loss`, of which the former wins. Call it after `data.carry`."""
    dft, bft = to.config.flag("use_dft_loss"), to.config.flag("use_bft_loss")
    name = "bft" if bft else "dft" if dft else "sft"
    theirs = f"use_{name}_loss" if name != "sft" else "cross entropy"
    if name != "sft" and on_megatron(to.config):
        theirs += " (which its Megatron backends ignore)"
    to.carry("objective", theirs, "objective.name", name)
    if not bft:
        to.show("objective", "mean over supervised tokens", "mean over supervised tokens")
        return
    for variable, field, value in (
        ("BFT_GROUP_SIZE", "objective.group_size", environment.group_size()),
        ("BFT_CONF_GAMMA", "objective.gamma", environment.gamma()),
    ):
        if os.environ.get(variable, "").strip():
            to.fields[field] = value
        to.show("objective", f"{variable} {value:g}", f"{field} {value:g}")
    to.show(
        "objective", "mean over samples, added up over accumulated batches", "mean over samples of the global batch"
    )
    if to.fields["data.packing"]:
        to.show("objective", "a packed row is one sample", "each conversation is a sample")
