"""One rank of `bft-megatron convert`: write the model as a Megatron checkpoint of weights alone, a `release`."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from bft_megatron.checkpoint.integrity import seal
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.recipe.schema import Recipe
from bft_megatron.run.folder import RunFolder
from bft_megatron.training.model import build
from bft_megatron.upstream import checkpoint_writer


def run(recipe: Recipe, config: ModelConfig, model_folder: Path, console: TextIO) -> None:
    """Load the weights into the recipe's layout and save them where Megatron-LM's own `--load` finds them too.

    Raises:
        UserError, FieldError: as for `build`.
    """
    checkpoint_writer.without_helper_process()
    checkpoint_writer.name_causes()
    chunks = build(recipe, config, model_folder, ["--no-save-optim", "--no-save-rng"])
    from megatron.training.checkpointing import save_checkpoint

    save_checkpoint(0, chunks, None, None, 0, release=True)
    folder = RunFolder.of(recipe)
    seal(folder.converted)
    if dist.get_rank() == 0:
        print(f"wrote {folder.converted}", file=console, flush=True)
    dist.destroy_process_group()
