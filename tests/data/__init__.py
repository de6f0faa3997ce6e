"""Tests of `bft_megatron.data`."""
