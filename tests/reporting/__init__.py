"""Tests of `bft_megatron.reporting`."""
