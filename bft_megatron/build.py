"""A recipe's model on its layout without Megatron's `pretrain`, which can only train: for `convert` and `check`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from bft_megatron import arguments, train
from bft_megatron.hf.architectures import ModelConfig, megatron_flags
from bft_megatron.recipe import Recipe

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


def build(recipe: Recipe, config: ModelConfig, model_folder: Path, flags: list[str] | None = None) -> list[GPTModel]:
    """This rank's model chunks as training would begin with them, weights and adapters included, not wrapped for DDP.

    Joins the group of all ranks and sets Megatron's global arguments. Collective over all ranks.

    Args:
        flags: of Megatron's, beside the recipe's.

    Raises:
        FieldError: a flag under `megatron:` that Megatron does not have.
        UserError: no whole model in the folder.
    """
    on_cpu = train.runs_on_cpu(recipe)
    train.join(recipe, on_cpu)
    arguments.check_passed_through(recipe)
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.initialize import initialize_megatron
    from megatron.training.models.gpt import GPTModelBuilder

    all_flags = [*train.device_flags(on_cpu), *(flags or [])]
    margs = train.parse(arguments.megatron_arguments(recipe, megatron_flags(config), all_flags, 1, (0, 0)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        initialize_megatron()
        model = train.model_config(recipe, config, model_folder, margs, on_cpu, fresh=True)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        return GPTModelBuilder(model).build_distributed_models(groups, wrap_with_ddp=False)
