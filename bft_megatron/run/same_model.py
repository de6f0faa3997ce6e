"""Comparing the architecture of a recipe's model with that of the model which the run in its folder began with.

The recipe only names a folder, and the config there may have changed since. Weights are in the run's own checkpoints;
those of a LoRA run's base are compared in `lora.base`.
"""

from __future__ import annotations

from bft_megatron.errors import FieldError, UserError
from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.run.folder import RunFolder


def check(folder: RunFolder, config: ModelConfig) -> None:
    """Check that a run which goes on has the model that it began with. Call it before `RunFolder.write_config`.

    Raises:
        FieldError: the folder holds checkpoints of a run of another architecture, or does not tell of which.
    """
    if not folder.goes_on():
        return
    began = _began_with(folder)
    for name, was in vars(began).items():
        found = getattr(config, name)
        if was != found:
            raise FieldError(
                "model",
                f"its config.json has changed: {folder.root} holds checkpoints of a run with {name} {was}, not "
                f"{found}: put it back to go on with that run, or choose another output folder",
            )


def _began_with(folder: RunFolder) -> ModelConfig:
    try:
        return read_config(folder.model)
    except UserError as e:
        raise FieldError(
            "output",
            f"{folder.root} holds checkpoints and no config of their model ({e}): copy there the config.json of the "
            "model that the run began with, or choose another output folder",
        ) from None
