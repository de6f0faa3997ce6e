"""Training on Megatron's loop: what runs on every rank."""
