"""Fuzzers: each takes seconds by default, and FUZZ_SECONDS of the environment."""
