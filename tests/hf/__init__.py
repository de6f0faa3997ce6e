"""Tests of `bft_megatron.hf`."""
