"""The objective, with the settings of Balanced Fine-Tuning from the environment."""

from __future__ import annotations

import os

from bft_megatron.llamafactory.conversion import Conversion
from bft_megatron.llamafactory.parallelism import model_parallel_size, on_megatron
from bft_megatron.recipe import environment


def summed(to: Conversion) -> dict[str, int]:
    """Return what LLaMA-Factory's trainer adds up the gradient over where ours is a mean: name -> number.

    The loss of BFT is a mean over the samples of a micro-batch. transformers takes it for one that is divided by the
    step's tokens, as the other losses are: it adds up the micro-batches of a step, and multiplies by the number of
    processes unless `average_tokens_across_devices` is off.
    """
    config = to.config
    if not config.flag("use_bft_loss") or on_megatron(config):
        return {}
    copies = to.gpus // model_parallel_size(config) if config.flag("average_tokens_across_devices", True) else 1
    terms = {"micro-batches": config.integer("gradient_accumulation_steps", 1), "GPUs": copies}
    return {name: number for name, number in terms.items() if number > 1}


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
        if not to.config.flag("average_tokens_across_devices", True):
            to.lose("average_tokens_across_devices", "a step's tokens count alike on all GPUs")
        return
    for variable, field, value in (
        ("BFT_GROUP_SIZE", "objective.group_size", environment.group_size()),
        ("BFT_CONF_GAMMA", "objective.gamma", environment.gamma()),
    ):
        if os.environ.get(variable, "").strip():
            to.fields[field] = value
        to.show("objective", f"{variable} {value:g}", f"{field} {value:g}")
    terms = " and ".join(summed(to))
    to.show(
        "objective",
        f"mean over samples{', a sum over ' if terms else ''}{terms}",
        "mean over samples of the global batch",
    )
    if to.fields["data.packing"]:
        to.show("objective", "a packed row is one sample", "each conversation is a sample")
