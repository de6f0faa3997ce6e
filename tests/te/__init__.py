"""Tests on Transformer Engine's own layers, which build without a GPU and compute only on one: `make test-te`."""
