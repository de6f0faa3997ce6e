"""The model, the run's folder and, for LoRA, the adapters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bft_megatron.llamafactory.conversion import Conversion
from bft_megatron.textfiles import read_object

_OF_ADAPTER = (
    ("LoRA rank", "r", "lora.rank"),
    ("LoRA scale", "lora_alpha", "lora.alpha"),
    ("LoRA modules", "target_modules", "lora.target"),
)
"""Settings that a run takes from the adapter it goes on with: matter, name in `adapter_config.json`, recipe's field."""


def carry(to: Conversion) -> None:
    """Convert `model_name_or_path`, `train_from_scratch`, `use_cpu`, `output_dir` and the lora_* fields."""
    config = to.config
    for matter, theirs, ours in (("model", "model_name_or_path", "model"), ("run's folder", "output_dir", "output")):
        to.carry_field(matter, theirs, ours, config.text(theirs))
    if config.flag("train_from_scratch"):
        to.carry("weights", "train_from_scratch", "init", "random")
    if config.flag("use_cpu"):
        to.carry("device", "use_cpu", "device", "cpu")
    if config.text("finetuning_type", "lora") == "lora":
        _carry_lora(to)


def _carry_lora(to: Conversion) -> None:
    if own := _carry_start(to):
        for matter, theirs, ours in _OF_ADAPTER:
            to.carry(matter, f"{theirs} of the adapter", ours, own[theirs])
        return
    config = to.config
    rank = config.integer("lora_rank", 8)
    alpha = config.number("lora_alpha", 2 * rank) or 2 * rank
    to.carry("LoRA rank", f"lora_rank {rank}", "lora.rank", rank)
    if config.flag("use_rslora"):
        scaled = round(alpha * math.sqrt(rank), 6)
        to.carry("LoRA scale", f"use_rslora: {alpha:g} / sqrt({rank})", "lora.alpha", scaled, f"{scaled:g} / {rank}")
    else:
        to.carry("LoRA scale", f"lora_alpha / lora_rank = {alpha:g} / {rank}", "lora.alpha", float(alpha))
    target = config.texts("lora_target") or ["all"]
    to.carry("LoRA modules", f"lora_target {','.join(target)}", "lora.target", "all" if target == ["all"] else target)


def _carry_start(to: Conversion) -> dict[str, Any] | None:
    """Convert the adapter to go on with; return its own settings, which are then the run's, if they can be read."""
    config = to.config
    adapters = config.texts("adapter_name_or_path")
    if len(adapters) > 1 or (adapters and config.flag("create_new_adapter")):
        to.lose("adapter_name_or_path", "merge these adapters into the model first, and name the merged one")
    elif adapters:
        to.carry("LoRA start", f"adapter_name_or_path {adapters[0]}", "lora.adapter", adapters[0])
        file = Path(adapters[0]).expanduser() / "adapter_config.json"
        if file.is_file() and all((own := read_object(file)).get(name) for _, name, _ in _OF_ADAPTER):
            return own
        to.differ("adapter_name_or_path", "its own rank, alpha and modules go on, and are not here to be read: set "
                  "lora.rank, lora.alpha and lora.target to them")  # fmt: skip
    return None
