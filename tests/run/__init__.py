"""Tests of `bft_megatron.run`."""
