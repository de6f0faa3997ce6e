"""Tests of `bft_megatron.training`."""
