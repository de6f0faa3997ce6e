"""Tests that need a GPU: `make test-gpu`. Skipped, with the reason, where there is none."""
