"""The recipe's model in its layout: Megatron's configuration of it, with weights and adapters.

For commands that do not train, `build` makes the model without Megatron's `pretrain`, and `forward` runs it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bft_megatron.hf import load
from bft_megatron.hf.megatron_flags import configure, megatron_flags
from bft_megatron.hf.model_config import ModelConfig
from bft_megatron.lora import adapters
from bft_megatron.recipe.schema import Recipe
from bft_megatron.training import arguments, initialize
from bft_megatron.upstream import command_line, gated_delta

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


def model_config(
    recipe: Recipe, config: ModelConfig, model_folder: Path | None, margs: Any, on_cpu: bool, *, fill: bool
) -> Any:
    """Return Megatron's model configuration, with weights, adapters and, without Transformer Engine, our layers.

    Args:
        model_folder: the folder of the weights; None if they are drawn or have no values.
        fill: load the weights from the folder or draw them; False if a checkpoint provides all of them.
    """
    from megatron.training.argument_utils import gpt_config_from_args

    with command_line.refusals():
        model = gpt_config_from_args(margs)
    configure(model, config)
    if initialize.torch_layers(recipe):
        from bft_megatron.layers.spec import layer_spec

        model.transformer_layer_spec = layer_spec
    if config.linear_attention is not None:
        gated_delta.install()
    if fill:
        source = model_folder if recipe.init == "pretrained" else None
        model.pre_wrap_hooks.append(load.weights_hook(source, config, seed=recipe.train.seed))
        model.post_wrap_hooks.append(load.buffers_hook(source, config, seed=recipe.train.seed))
    if recipe.moe.freeze_router:
        from bft_megatron.training import routers

        model.pre_wrap_hooks.append(routers.freeze)
    if recipe.lora is not None:
        adapters.install(model, recipe, config, torch_layers=initialize.torch_layers(recipe))
    if config.linear_attention is not None and not initialize.torch_layers(recipe):
        from bft_megatron.layers.delta_net import with_delta_nets

        model.transformer_layer_spec = with_delta_nets(model.transformer_layer_spec)
    if config.norm_after_rotary:
        from bft_megatron.layers.norm_after_rotary import norm_after_rotary

        model.transformer_layer_spec = norm_after_rotary(model.transformer_layer_spec)
    return model


def build(recipe: Recipe, config: ModelConfig, model_folder: Path, flags: list[str] | None = None) -> list[GPTModel]:
    """Build this rank's model chunks as at the start of training, with weights and adapters, not wrapped for DDP.

    Joins the process group of all ranks and sets Megatron's global arguments. Collective over all ranks.

    Args:
        flags: Megatron flags in addition to the recipe's.

    Raises:
        FieldError: a flag under `megatron:` that Megatron does not have.
        UserError: the folder does not hold a complete model.
    """
    on_cpu = initialize.runs_on_cpu(recipe)
    initialize.join(recipe, on_cpu)
    arguments.check_passed_through(recipe)
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.initialize import initialize_megatron
    from megatron.training.models.gpt import GPTModelBuilder

    all_flags = [*initialize.device_flags(recipe, experts=config.experts is not None), *(flags or [])]
    margs = command_line.parse(arguments.megatron_arguments(recipe, megatron_flags(config), all_flags, 1, (0, 0)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        initialize_megatron()
        model = model_config(recipe, config, model_folder, margs, on_cpu, fill=True)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        return GPTModelBuilder(model).build_distributed_models(groups, wrap_with_ddp=False)


def forward(chunks: list[GPTModel], batches: list[dict[str, Tensor]], step: Callable[..., Any], recipe: Recipe) -> None:
    """Run micro-batches once through this rank's chunks by Megatron's own schedule, without gradients.

    Args:
        batches: on the CPU, the same on all ranks that share one copy of the model.
        step: Megatron's `forward_step_func`.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(batches),
        seq_length=recipe.data.seq_length,
        micro_batch_size=recipe.train.micro_batch_size,
        forward_only=True,
    )
