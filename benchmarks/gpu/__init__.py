"""Benchmarks on one GPU: `make bench-gpu`. Every table names the card; rows are compared within one run."""
