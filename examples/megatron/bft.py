"""A fine-tune in Megatron-LM's own loop: plain.py with its own loss, bft.py with BFT; compare them by `diff`.

On the tiny model of recipes/tiny, on two CPUs:

    torchrun --nproc-per-node 2 examples/megatron/bft.py $(cat examples/megatron/tiny.args)
"""

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.datasets.sft_dataset import SFTDataset

from bft_megatron.integrations.megatron import ForwardStep
from bft_megatron.layers.spec import layer_spec
from bft_megatron.upstream import cuda_on_cpu


def provide(num_samples, vp_stage=None):
    """Return the training, validation and test conversations, as Megatron's `--sft` packs them."""
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend_per_split=[(args.train_data_path, None), (args.valid_data_path, None), None],
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        context_parallel_size=args.context_parallel_size,
    )
    return BlendedMegatronDatasetBuilder(SFTDataset, num_samples, lambda: True, config).build()


provide.is_distributed = True

if __name__ == "__main__":
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        cuda_on_cpu.install()
    args = parse_and_validate_args()
    model = gpt_config_from_args(args)
    if on_cpu:
        model.transformer_layer_spec = layer_spec  # Megatron's own layers take packed rows on GPUs alone
    container = pretrain_cfg_container_from_args(args, model)
    pretrain(container, provide, ModelType.encoder_or_decoder, ForwardStep("bft", group_size=8))
