"""Tests of `bft_megatron.plan`."""
