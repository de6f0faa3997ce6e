"""Tests of `bft_megatron.lora`."""
