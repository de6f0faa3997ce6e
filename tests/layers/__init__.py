"""Tests of `bft_megatron.layers`."""
