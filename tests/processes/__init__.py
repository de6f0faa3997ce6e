"""Tests of `bft_megatron.processes`."""
