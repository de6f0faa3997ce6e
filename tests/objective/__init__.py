"""Tests of `bft_megatron.objective`."""
