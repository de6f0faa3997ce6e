"""Converting a config: checks that it is an SFT and converts its fields, one concern after another."""

from __future__ import annotations

from pathlib import Path

from bft_megatron.errors import UserError
from bft_megatron.llamafactory import data, model, objective, other, parallelism, saving, template, training
from bft_megatron.llamafactory.config import Config
from bft_megatron.llamafactory.conversion import Conversion


def convert(path: Path, gpus: int | None = None) -> Conversion:
    """Convert a config.

    Args:
        path: YAML or JSON file.
        gpus: number of GPUs that the run uses; default: its `ray_num_workers`, else as many as its layout needs.

    Raises:
        UserError: a file that cannot be read, an invalid value, or a config of anything but an SFT of all weights or of
            LoRA adapters; names file, line and field.
    """
    config = Config(path)
    _check_is_sft(config)
    copy = parallelism.model_parallel_size(config)
    said = gpus or (config.integer("ray_num_workers", 1) if config.given("ray_num_workers") else None)
    gpus = said or copy
    if gpus % copy:
        raise UserError(
            f"tensor x pipeline x context = {copy} GPUs hold the model once; {gpus} is not a multiple: give another "
            "--gpus",
            str(path),
        )
    conversion = Conversion(config, gpus, assumed=said is None)
    for concern in (model, template, data, objective, parallelism, training, saving, other):
        concern.carry(conversion)
    conversion.lost.sort(key=lambda lost: config.names.index(lost.name))
    return conversion


def _check_is_sft(config: Config) -> None:
    if not config.given("model_name_or_path"):
        raise UserError("names no model_name_or_path: a config of `llamafactory-cli train` is needed", str(config.path))
    if (stage := config.text("stage", "sft")) != "sft":
        raise config.wrong("stage", f"{stage} is another kind of training; only sft can be carried over")
    if not config.flag("do_train", True):
        raise config.wrong("do_train", "this config trains nothing")
    if (kind := config.text("finetuning_type", "lora")) not in ("full", "lora"):
        raise config.wrong("finetuning_type", f"{kind} has no counterpart here: full and lora have")
    for name in ("dataset", "output_dir"):
        if not config.given(name):
            raise UserError(f"names no {name}", str(config.path))
