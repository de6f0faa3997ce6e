"""Tests of `bft_megatron.recipe`."""
