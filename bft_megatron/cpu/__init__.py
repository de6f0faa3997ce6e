"""Megatron on a machine without a GPU: the only place that knows that there is none."""
