"""Tests of `bft_megatron.cpu`."""
