"""Megatron-Bridge 0.6 in an environment of its own: `make test-bridge`."""
