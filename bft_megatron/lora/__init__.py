"""Low-rank adapters: on Megatron's parallel linear layers, and as PEFT's folders in and out."""
