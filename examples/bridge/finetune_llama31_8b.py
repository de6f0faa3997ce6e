"""Fine-tune Llama 3.1 8B with BFT in Megatron-Bridge 0.6, by Bridge's own recipe.

    torchrun --nproc-per-node 2 examples/bridge/finetune_llama31_8b.py CHECKPOINT

CHECKPOINT is the model as a Megatron checkpoint, which Bridge writes by `AutoBridge.import_ckpt`. Data, optimizer,
parallel sizes and logs are the recipe's.
"""

from __future__ import annotations

import sys

from megatron.bridge.recipes.llama.h100.llama3 import llama31_8b_sft_2gpu_h100_bf16_config
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.finetune import finetune

from bft_megatron.integrations.bridge import BftForwardStep


def configure(checkpoint: str) -> ConfigContainer:
    """Return the recipe's configuration with what the objective needs: sums over samples, which Bridge divides once."""
    config = llama31_8b_sft_2gpu_h100_bf16_config()
    config.checkpoint.pretrained_checkpoint = checkpoint
    config.model.calculate_per_token_loss = True
    config.ddp.average_in_collective = False
    return config


def forward_step() -> BftForwardStep:
    """Return BFT with windows of 256 tokens; 128256 entries of the vocabulary are the model's own."""
    return BftForwardStep("bft", vocab_size=128256, group_size=256)


if __name__ == "__main__":
    finetune(config=configure(sys.argv[1]), forward_step_func=forward_step())
