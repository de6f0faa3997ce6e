"""Low-rank adapters (LoRA): on Megatron's parallel linear layers, and as PEFT folders in and out."""
