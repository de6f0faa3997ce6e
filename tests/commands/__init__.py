"""Tests of `bft_megatron.commands`."""
