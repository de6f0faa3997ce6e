"""Tests of `bft_megatron.reading`, `bft_megatron.conversations` and `bft_megatron.data`."""
